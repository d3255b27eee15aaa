"""Language model head: logits, or the loss without materializing all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_dist.config import ModelConfig
from reformer_dist.models.inputs import check_labels
from reformer_dist.ops.cross_entropy import chunked_cross_entropy, token_cross_entropy


class LanguageModelHead(nn.Module):
    """Projection to the vocabulary; with config.tie_embeddings, its weight is `table`, the token embedding's.

    With config.embedding_dim, a linear layer first projects hidden states to the width of the table.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, table: nn.Parameter) -> None:
        super().__init__()
        self.loss_chunk = config.loss_chunk
        self.to_table = None
        if config.embedding_dim is not None:
            self.to_table = nn.Linear(config.output_dim, config.embedding_dim)
        untied = nn.Parameter(torch.empty(vocab_size, config.table_width))
        self.weight = table if config.tie_embeddings else untied
        self.bias = nn.Parameter(torch.empty(vocab_size))

    def forward(self, hidden: Tensor, labels: Tensor | None, *, per_token: bool = False) -> Tensor:
        """hidden [B, S, output_dim] -> logits [B, S, V] float32, or with labels [B, S] the summed loss in nats.

        per_token: returns the loss of each token instead, [B, S] float32, which has no gradient. Raises ValueError
        unless labels are integers [B, S] below V, or -100.
        """
        if labels is not None:
            check_labels(labels, "B S", hidden)
        elif per_token:
            raise ValueError("per_token_loss=True: there are no labels; give labels [B, S]")
        if self.to_table is not None:
            hidden = self.to_table(hidden)
        if labels is None:
            return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        flat = hidden.reshape(-1, hidden.shape[-1])
        if per_token:
            flat_labels = labels.reshape(-1)
            losses = token_cross_entropy(flat, self.weight, self.bias, flat_labels, self.loss_chunk)
            return losses.view_as(labels)
        return chunked_cross_entropy(flat, self.weight, self.bias, labels.reshape(-1), self.loss_chunk)
