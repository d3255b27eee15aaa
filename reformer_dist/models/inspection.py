"""Attention inspection: bucket ids and dense attention weights of every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.models.base import ReformerModel
from reformer_dist.models.sequence import LayerAccess, WholeSequence
from reformer_dist.ops.exact_attention import ExactOptions
from reformer_dist.ops.lsh import attend_locally
from reformer_dist.ops.lsh.attention import Exchange, LocalExchange

MAX_TOKENS = 4096


@dataclass(frozen=True)
class AttentionView:
    """Attention weights and bucket ids of one layer."""

    weights: Tensor
    """[B, H, S, S]: weight of key j for query i, combined over all rounds; rows sum to 1."""
    bucket_ids: Tensor | None
    """[B, H, R, S] of an LSH layer, in which a local round is one more round of zeros; None for other kinds."""


@torch.no_grad()
def inspect_attention(
    model: ReformerModel, tokens: Tensor, *, key_padding_mask: Tensor | None = None, step: int | None = None
) -> list[AttentionView]:
    """Attention of every layer on tokens [B, S], without dropout.

    step: training step whose hash rotations are used; None: those of evaluation. Raises ValueError for more than
    4096 tokens, since the weights are dense.
    """
    if tokens.shape[1] > MAX_TOKENS:
        raise ValueError(f"{tokens.shape[1]} tokens: must be at most {MAX_TOKENS} to inspect attention")
    recorder, was_training = _RecordingSequence(), model.training
    try:
        model.eval().encode(tokens, key_padding_mask=key_padding_mask, step=step, sequence=recorder)
    finally:
        model.train(was_training)
    return [recorder.views[layer] for layer in sorted(recorder.views)]


class _RecordingSequence(WholeSequence):
    def __init__(self) -> None:
        self.views: dict[int, AttentionView] = {}

    def of_layer(self, layer: int) -> LayerAccess:
        return _RecordingLayer(self.views, layer)


class _RecordingLayer(WholeSequence):
    """Computes attention as usual, and again with one-hot values, whose outputs are the weights themselves."""

    def __init__(self, views: dict[int, AttentionView], layer: int) -> None:
        self._views, self._layer = views, layer

    def bucket_attention(self, q: Tensor, k: Tensor | None, v: Tensor, exchange: Exchange) -> Tensor:
        assert isinstance(exchange, LocalExchange)
        columns = [attend_locally(q, k, values, exchange) for values in _one_hot_values(v)]
        ids = exchange.bucket_ids if k is None else None
        self._views[self._layer] = AttentionView(torch.cat(columns, dim=-1)[..., : v.shape[2]], ids)
        return super().bucket_attention(q, k, v, exchange)

    def exact_attention(
        self, q: Tensor, k: Tensor, v: Tensor, options: ExactOptions, key_padding_mask: Tensor | None
    ) -> Tensor:
        heads = {"first_head": 0, "n_heads": q.shape[1]}
        columns = [options.attend(q, k, values, key_padding_mask, **heads) for values in _one_hot_values(v)]
        self._views[self._layer] = AttentionView(torch.cat(columns, dim=-1)[..., : v.shape[2]], None)
        return super().exact_attention(q, k, v, options, key_padding_mask)


def _one_hot_values(v: Tensor) -> list[Tensor]:
    """Columns of the identity [S, S] in groups of D, the width of v [B, H, S, D]; the last is zero-padded."""
    seq_len, width = v.shape[2:]
    n_columns = -(-seq_len // width) * width
    identity = torch.eye(seq_len, n_columns, dtype=v.dtype, device=v.device)
    return [part.expand(*v.shape) for part in identity.split(width, dim=1)]
