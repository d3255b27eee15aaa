"""Decoding: a text is read once, and then grows token by token at a cost that does not grow with it.

    state = DecodingState(model.config)
    logits = model(prompts, key_padding_mask=mask, sequence=state)  # [B, S, V], by the usual fast path
    logits = model(tokens, sequence=state)  # [B, 1, V] of one more token of each row, and so on

A model, or a bare `ReformerStack`, knows nothing of it: to attention, the state is the rest of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reformer_dist.config import AttentionKind, ModelConfig, NeighbourRule
from reformer_dist.models.sequence import LayerAccess, SequenceAccess, WholeSequence, first_real
from reformer_dist.ops.exact_attention import ExactOptions
from reformer_dist.ops.kv_cache import AttentionCache, BucketCache, ExactCache, WindowCache
from reformer_dist.ops.lsh import CrossKeys, CrossOptions, WindowRule, cross_attention
from reformer_dist.ops.lsh.attention import Exchange, LocalExchange


def kv_cache_unsupported_reason(config: ModelConfig) -> str | None:
    """Why such a model can't be decoded token by token; None where it can."""
    if not config.causal:
        return "model.causal=false: what a token sees changes with each one that follows"
    if config.neighbours is NeighbourRule.chunk and AttentionKind.lsh in config.layer_kinds():
        return "model.neighbours=chunk: which earlier tokens a token sees changes with those that follow"
    if config.compat.local_chunk_len > 0 and AttentionKind.local in config.layer_kinds():
        return "model.compat.local_chunk_len: only local attention of a sliding window (0) keeps its last tokens"
    return None


class DecodingState(WholeSequence):
    """What the layers remember of B texts. Implements `models.sequence.SequenceAccess`.

    The first call reads the prompts; their padding, if any, must stand before the text. Each later call takes one
    token of each row, and no mask. Raises ValueError where the model can't be decoded so.
    """

    def __init__(self, config: ModelConfig) -> None:
        reason = kv_cache_unsupported_reason(config)
        if reason is not None:
            raise ValueError(reason)
        self._longest = config.max_positions
        self._layers: dict[int, _LayerState] = {}
        self._n_places = 0
        self._first: Tensor | None = None
        self._least_padding = 0

    def positions(self, n_tokens: int, device: torch.device, key_padding_mask: Tensor | None = None) -> Tensor:
        if not self._layers:
            self._begin(key_padding_mask)
            self._n_places = n_tokens
            return super().positions(n_tokens, device, key_padding_mask)
        if n_tokens != 1 or key_padding_mask is not None:
            raise ValueError(f"{n_tokens} tokens: behind the prompts, a call takes one token a row and no mask")
        place = self._n_places
        if self._longest is not None and place - self._least_padding >= self._longest:
            raise ValueError(f"{place + 1} tokens: this model's positions end at {self._longest}")
        self._n_places += 1
        if self._first is None:
            return torch.full((1,), place, device=device)
        return place - self._first.unsqueeze(1)

    def _begin(self, mask: Tensor | None) -> None:
        if mask is None or bool(mask.all()):
            return
        first = first_real(mask)
        behind = torch.arange(mask.shape[1], device=mask.device) >= first.unsqueeze(1)
        if not torch.equal(mask, behind):
            raise ValueError("key_padding_mask: each row must hold a text, with its padding before it")
        self._first, self._least_padding = first, int(first.min())

    def of_layer(self, layer: int) -> LayerAccess:
        if layer not in self._layers:
            self._layers[layer] = _LayerState(self._first)
        return self._layers[layer]

    def select_rows(self, rows: Tensor) -> None:
        """Makes row i what row rows[i] was: rows [N] int64 may repeat some and leave others out."""
        for state in self._layers.values():
            state.select_rows(rows)
        if self._first is not None:
            self._first = self._first[rows]
            self._least_padding = int(self._first.min())

    def n_bytes(self) -> int:
        """Memory that the caches hold."""
        return sum(state.n_bytes() for state in self._layers.values())


class _LayerState(WholeSequence):
    """Reads a prompt as `WholeSequence` does, and remembers it."""

    def __init__(self, first: Tensor | None) -> None:
        self._first = first
        self._cache: AttentionCache | None = None
        self._source: CrossKeys | None = None

    def bucket_attention(self, q: Tensor, k: Tensor | None, v: Tensor, exchange: Exchange) -> Tensor:
        assert isinstance(exchange, LocalExchange)
        options = exchange.options
        _refuse_dropout(options.dropout)
        if isinstance(self._cache, WindowCache):
            assert k is not None
            return self._cache.attend(q, k, v)
        if isinstance(self._cache, BucketCache):
            return self._cache.attend(q, v, exchange.bucket_ids)
        if k is None:
            self._cache = BucketCache(q, v, exchange.bucket_ids, options, exchange.key_padding_mask)
        else:
            assert options.n_buckets == 1 and isinstance(options.rule, WindowRule) and options.rule.sees_self
            self._cache = WindowCache(k, v, options.rule.window, options.scale, self._first)
        return super().bucket_attention(q, k, v, exchange)

    def cross_attention(
        self,
        q: Tensor,
        query_ids: Tensor | None,
        keys: Callable[[], CrossKeys],
        options: CrossOptions,
        sequence_of_keys: SequenceAccess,
    ) -> Tensor:
        if self._source is None:
            self._source = keys()
        return cross_attention(q, query_ids, self._source, options)

    def exact_attention(
        self, q: Tensor, k: Tensor, v: Tensor, options: ExactOptions, key_padding_mask: Tensor | None
    ) -> Tensor:
        _refuse_dropout(options.dropout)
        if isinstance(self._cache, ExactCache):
            return self._cache.attend(q, k, v)
        self._cache = ExactCache(k, v, self._first)
        return super().exact_attention(q, k, v, options, key_padding_mask)

    def select_rows(self, rows: Tensor) -> None:
        assert self._cache is not None
        self._cache.select_rows(rows)
        self._first = None if self._first is None else self._first[rows]
        self._source = None if self._source is None else self._source.select_rows(rows)

    def n_bytes(self) -> int:
        return sum(held.n_bytes() for held in (self._cache, self._source) if held is not None)


def _refuse_dropout(dropout: float) -> None:
    if dropout > 0:
        raise ValueError("decoding needs a model in evaluation mode: call model.eval()")
