"""Coverage of a model's LSH layers: the part of exact attention's softmax mass on the keys that LSH finds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from reformer_dist.data import IGNORE_INDEX, Batch
from reformer_dist.errors import ConfigError
from reformer_dist.models import ReformerLM
from reformer_dist.models.sequence import WholeSequence
from reformer_dist.ops.lsh.attention import Exchange, LocalExchange
from reformer_dist.ops.lsh.coverage import Coverage, measure_coverage
from reformer_dist.ops.lsh.shared_keys import shared_keys


class CoverageSequence(WholeSequence):
    """Measures the coverage of each LSH layer during a forward, which it does not change."""

    def __init__(self, n_queries: int | None = None) -> None:
        """n_queries: of each row, evenly spaced, that are measured; None: all."""
        self._n_queries = n_queries
        self.layers: list[Coverage] = []
        """Coverage of each LSH layer, in order."""

    def bucket_attention(self, q: Tensor, k: Tensor | None, v: Tensor, exchange: Exchange) -> Tensor:
        assert isinstance(exchange, LocalExchange)
        options, mask = exchange.options, exchange.key_padding_mask
        if k is None or options.own_keys:  # other separate keys are those of local attention, which does not hash
            keys, ids = shared_keys(q) if k is None else k, exchange.bucket_ids
            self.layers.append(
                measure_coverage(q, keys, ids, options, mask, exchange.query_ids, self._sample(q.shape[2]))
            )
        return super().bucket_attention(q, k, v, exchange)

    def _sample(self, seq_len: int) -> Tensor | None:
        if self._n_queries is None or self._n_queries >= seq_len:
            return None
        return torch.linspace(0, seq_len - 1, self._n_queries, dtype=torch.float64).round().long()


@torch.no_grad()
def measure_layers(model: ReformerLM, batches: Iterable[Batch]) -> list[dict[str, float]]:
    """Coverage of each LSH layer over rows of text, averaged over heads. Raises ConfigError if it is undefined."""
    config, totals = model.config, list[Coverage]()
    if config.compat.chunk_wrap:
        reason = "coverage is not defined for chunks that wrap into other rounds"
        raise ConfigError(f"model.compat.chunk_wrap=true: {reason}")
    device = next(model.parameters()).device
    for batch in batches:
        sequence = CoverageSequence()
        tokens, labels = batch["tokens"].to(device), batch["labels"].to(device)
        given: dict[str, Tensor] = {
            name: batch[name].to(device) for name in ("document_ids", "position_ids") if name in batch
        }
        model(tokens, labels, key_padding_mask=labels != IGNORE_INDEX, sequence=sequence, **given)
        totals = totals or [Coverage() for _ in sequence.layers]
        for total, layer in zip(totals, sequence.layers, strict=True):
            total.add(layer)
    if not totals:
        raise ConfigError(f"model.layers={[kind.name for kind in config.layers]}: none of them is lsh")
    return [total.fractions() for total in totals]
