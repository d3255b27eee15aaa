"""Sequence classification: pooled hidden states to logits over classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from reformer_dist.config import ModelConfig, Pooling
from reformer_dist.models.base import LARGEST_VOCABULARY, ReformerModel
from reformer_dist.models.context import ForwardContext, ForwardOptions
from reformer_dist.models.initialization import init_weights
from reformer_dist.models.inputs import check_labels
from reformer_dist.ops.checks import check_integer, check_range
from reformer_dist.ops.cross_entropy import IGNORE_INDEX
from reformer_dist.ops.dropout import TokenCoords, token_dropout
from reformer_dist.ops.profiling import part


class ReformerForSequenceClassification(ReformerModel):
    """Predicts one class per sequence, from hidden states pooled by config.pooling.

    Under sequence parallelism (`models.sequence`), every rank holds the labels of the whole rows and returns an
    equal fraction of the loss.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, n_classes: int, seed: int = 0) -> None:
        super().__init__(config, vocab_size, seed)
        check_integer("n_classes", n_classes, least=1, most=LARGEST_VOCABULARY)
        self.n_classes = n_classes
        self.head = ClassificationHead(config, n_classes)
        init_weights(self, config, seed)

    def forward(self, tokens: Tensor, labels: Tensor | None = None, **options: Unpack[ForwardOptions]) -> Tensor:
        """tokens [B, S] -> logits [B, n_classes] float32, or with labels [B] the summed loss in nats.

        Labels of -100 are ignored. The keywords are those of `ForwardOptions`. Raises ValueError.
        """
        context = self._build_context(tokens, options)
        if labels is not None:
            check_labels(labels, "B", tokens)
            check_range("labels", labels, self.n_classes, limit="n_classes", also=IGNORE_INDEX)
        hidden = self._hidden(tokens, context)
        with part("loss"):
            logits: Tensor = self.head(pool(hidden, context, self.config.pooling), context)
            if labels is None:
                return logits
            loss = F.cross_entropy(logits, labels.long(), reduction="sum", ignore_index=IGNORE_INDEX)
            return loss / context.sequence.n_slices


class ClassificationHead(nn.Module):
    """Linear, tanh, linear, with dropout before each linear layer, as in Hugging Face's head."""

    def __init__(self, config: ModelConfig, n_classes: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.dense = nn.Linear(config.output_dim, config.dim)
        self.to_logits = nn.Linear(config.dim, n_classes)

    def forward(self, pooled: Tensor, context: ForwardContext) -> Tensor:
        """pooled [B, output_dim] float32 -> logits [B, n_classes] float32."""
        dense = self.dense(self._drop(pooled, "pooled", context).to(self.dense.weight.dtype))
        return self.to_logits(self._drop(torch.tanh(dense), "dense", context)).float()

    def _drop(self, x: Tensor, site: str, context: ForwardContext) -> Tensor:
        coords = TokenCoords(context.coords.rows, torch.zeros(1, dtype=torch.int64, device=x.device))
        seed = context.seed_for("head", site)
        return token_dropout(x.unsqueeze(1), context.dropout(self.dropout), seed, coords).squeeze(1)


def pool(hidden: Tensor, context: ForwardContext, pooling: Pooling) -> Tensor:
    """Pools hidden [B, S, output_dim] to one vector per row, [B, output_dim] float32; padding is ignored."""
    mask, sequence, positions = context.key_padding_mask, context.sequence, context.coords.positions
    real = torch.ones_like(hidden[..., 0], dtype=torch.bool) if mask is None else mask
    if pooling is Pooling.mean:
        n_real = sequence.gather(real.sum(dim=1)).sum(dim=0)
        weights = real.float() / n_real.clamp_min(1).unsqueeze(1)
    elif pooling is Pooling.first:
        first = torch.where(real, positions, torch.iinfo(positions.dtype).max).amin(dim=1)
        weights = real & (positions == sequence.gather(first).amin(dim=0).unsqueeze(1))
    else:
        last = torch.where(real, positions, -1).amax(dim=1)
        weights = real & (positions == sequence.gather(last).amax(dim=0).unsqueeze(1))
    local_sum = (weights.unsqueeze(1).float() @ hidden.float()).squeeze(1)
    return sequence.gather(local_sum).sum(dim=0)
