"""From hidden vectors to logits, or to the loss without ever holding all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_dist.ops.cross_entropy import chunked_cross_entropy


class LanguageModelHead(nn.Module):
    """Logits over the vocabulary; `weight` may be the token embedding's table."""

    def __init__(self, dim: int, vocab_size: int, loss_chunk: int, weight: nn.Parameter | None) -> None:
        super().__init__()
        self.loss_chunk = loss_chunk
        self.weight = nn.Parameter(torch.empty(vocab_size, dim)) if weight is None else weight
        self.bias = nn.Parameter(torch.empty(vocab_size))

    def forward(self, hidden: Tensor, labels: Tensor | None) -> Tensor:
        """hidden [B, S, dim] -> logits [B, S, V] float32, or, given labels [B, S], the summed loss in nats."""
        if labels is None:
            return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        flat = hidden.reshape(-1, hidden.shape[-1])
        return chunked_cross_entropy(flat, self.weight, self.bias, labels.reshape(-1), self.loss_chunk)
