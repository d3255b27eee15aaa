"""Looking into attention: which tokens share buckets, and what each token attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.models.base import ReformerModel
from reformer_dist.models.sequence import LayerAccess, WholeSequence
from reformer_dist.ops.exact_attention import ExactOptions
from reformer_dist.ops.lsh import attend_locally
from reformer_dist.ops.lsh.attention import Exchange, LocalExchange

LONGEST = 4096


@dataclass(frozen=True)
class AttentionView:
    """What one layer's attention did."""

    weights: Tensor
    """[B, H, S, S]: how much of key j's value query i took, over all rounds; rows sum to 1."""
    bucket_ids: Tensor | None
    """[B, H, R, S] of an LSH layer (a local round is one more, of zeros); None of the others."""


@torch.no_grad()
def inspect_attention(
    model: ReformerModel, tokens: Tensor, *, key_padding_mask: Tensor | None = None, step: int | None = None
) -> list[AttentionView]:
    """The attention of every layer on tokens [B, S], without dropout; of up to 4096 tokens, since it is dense.

    step: whose hash rotations; None: those of evaluation. Raises ValueError for longer texts.
    """
    if tokens.shape[1] > LONGEST:
        raise ValueError(f"{tokens.shape[1]} tokens: attention is shown for up to {LONGEST}")
    watched, was_training = _WatchedSequence(), model.training
    try:
        model.eval().encode(tokens, key_padding_mask=key_padding_mask, step=step, sequence=watched)
    finally:
        model.train(was_training)
    return [watched.views[layer] for layer in sorted(watched.views)]


class _WatchedSequence(WholeSequence):
    def __init__(self) -> None:
        self.views: dict[int, AttentionView] = {}

    def of_layer(self, layer: int) -> LayerAccess:
        return _WatchedLayer(self.views, layer)


class _WatchedLayer(WholeSequence):
    """Attends as ever, and once more to the unit vectors as values, whose outputs are the weights themselves."""

    def __init__(self, views: dict[int, AttentionView], layer: int) -> None:
        self._views, self._layer = views, layer

    def bucket_attention(self, q: Tensor, k: Tensor | None, v: Tensor, exchange: Exchange) -> Tensor:
        assert isinstance(exchange, LocalExchange)
        columns = [attend_locally(q, k, units, exchange) for units in _unit_values(v)]
        ids = exchange.bucket_ids if k is None else None
        self._views[self._layer] = AttentionView(torch.cat(columns, dim=-1)[..., : v.shape[2]], ids)
        return super().bucket_attention(q, k, v, exchange)

    def exact_attention(
        self, q: Tensor, k: Tensor, v: Tensor, options: ExactOptions, key_padding_mask: Tensor | None
    ) -> Tensor:
        heads = {"first_head": 0, "n_heads": q.shape[1]}
        columns = [options.attend(q, k, units, key_padding_mask, **heads) for units in _unit_values(v)]
        self._views[self._layer] = AttentionView(torch.cat(columns, dim=-1)[..., : v.shape[2]], None)
        return super().exact_attention(q, k, v, options, key_padding_mask)


def _unit_values(v: Tensor) -> list[Tensor]:
    """Columns of the identity [S, S], as many at a time as values [B, H, S, D] are wide; zeros behind the last."""
    seq_len, width = v.shape[2:]
    n_columns = -(-seq_len // width) * width
    identity = torch.eye(seq_len, n_columns, dtype=v.dtype, device=v.device)
    return [part.expand(*v.shape) for part in identity.split(width, dim=1)]
