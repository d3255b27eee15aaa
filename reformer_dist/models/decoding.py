"""Incremental decoding with KV caches: prefill once, then a constant cost per token.

    state = DecodingState(model.config)
    logits = model(prompts, key_padding_mask=mask, sequence=state)  # prefill: [B, S, V], the usual forward
    logits = model(tokens, sequence=state)  # decode: [B, 1, V] for one more token per row, and so on

Models and a standalone `ReformerStack` need no code for this: to attention, the state is the rest of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from reformer_dist.config import AttentionKind, ModelConfig, NeighbourRule
from reformer_dist.models.sequence import LayerAccess, SequenceAccess, WholeSequence, first_real
from reformer_dist.ops.exact_attention import ExactOptions
from reformer_dist.ops.kv_cache import AttentionCache, BucketCache, ExactCache, WindowCache
from reformer_dist.ops.lsh import CrossKeys, CrossOptions, WindowRule, cross_attention
from reformer_dist.ops.lsh.attention import Exchange, LocalExchange


def kv_cache_unsupported_reason(config: ModelConfig) -> str | None:
    """Why a model can't be decoded with KV caches; None if it can."""
    if not config.causal:
        return "model.causal=false: tokens attend to later tokens; must be true"
    if config.neighbours is NeighbourRule.chunk and AttentionKind.lsh in config.layer_kinds():
        return "model.neighbours=chunk: which keys a token attends to depends on later tokens; must be window"
    if config.compat.local_chunk_len > 0 and AttentionKind.local in config.layer_kinds():
        chunk_len = config.compat.local_chunk_len
        return f"model.compat.local_chunk_len={chunk_len}: chunked local attention has no KV cache; must be 0"
    return None


class DecodingState(WholeSequence):
    """KV caches of all layers for B sequences. Implements `models.sequence.SequenceAccess`.

    The first call prefills from the prompts, which may be padded on the left. Each later call takes one token per
    row, and no mask; it continues the last document of its prompt, if that is divided into documents. Raises
    ValueError if the model can't be decoded with a cache.
    """

    def __init__(self, config: ModelConfig) -> None:
        reason = kv_cache_unsupported_reason(config)
        if reason is not None:
            raise ValueError(reason)
        self._max_positions = config.max_positions
        self._step: int | None = None
        """Of the first call, whose rotations sort all tokens into buckets."""
        self._prompt_ids: tuple[Tensor | None, Tensor | None] = (None, None)
        self._layers: dict[int, _LayerState] = {}
        self._length = 0
        """Of every row, padding included."""
        self._first: Tensor | None = None
        """[B]: index of each row's first real token, or of the first one of its last document; None: 0."""
        self._origin: Tensor | None = None
        """[B]: index of each row's token at position 0; None: 0."""
        self._least_origin = 0

    def check_call(
        self,
        config: ModelConfig,
        step: int | None,
        document_ids: Tensor | None,
        position_ids: Tensor | None,
        *,
        is_training: bool,
    ) -> None:
        """Raises ValueError if the next call has dropout, or other rotations than the first one.

        document_ids, position_ids [B, S]: of prompts, whose last document the next tokens continue.
        """
        dropouts = ("dropout", "attention_dropout", "ff_dropout", "layer_drop")
        used = [f"model.{name}={getattr(config, name)}" for name in dropouts if getattr(config, name) > 0]
        if is_training and used:
            raise ValueError(f"{used[0]}: decoding needs a model in evaluation mode; call model.eval()")
        if self._layers and step != self._step:
            raise ValueError(
                f"step={step}: must be that of the prompts, step={self._step}, whose rotations hash all"
            )
        for name, given in (("document_ids", document_ids), ("position_ids", position_ids)):
            if self._layers and given is not None:
                requirement = (
                    "a later token continues the last document of its prompt; begin a new state for another"
                )
                raise ValueError(f"{name}: {requirement}")
        self._step, self._prompt_ids = step, (document_ids, position_ids)

    def positions(self, n_tokens: int, device: torch.device, key_padding_mask: Tensor | None = None) -> Tensor:
        if not self._layers:
            self._read_prompts(key_padding_mask)
            self._length = n_tokens
            return super().positions(n_tokens, device, key_padding_mask)
        if n_tokens != 1 or key_padding_mask is not None:
            raise ValueError(f"{n_tokens} tokens: after the prompts, a call takes one token per row and no mask")
        index = self._length
        longest = index + 1 - self._least_origin
        if self._max_positions is not None and longest > self._max_positions:
            raise ValueError(f"{longest} tokens: this model's positions allow at most {self._max_positions}")
        self._length += 1
        if self._origin is None:
            return torch.full((1,), index, dtype=torch.int64, device=device)
        return index - self._origin.unsqueeze(1)

    def _read_prompts(self, mask: Tensor | None) -> None:
        if mask is not None and not bool(mask.all()):
            first = first_real(mask)
            left_padded = torch.arange(mask.shape[1], device=mask.device) >= first.unsqueeze(1)
            if not torch.equal(mask, left_padded):
                raise ValueError("key_padding_mask: each row must have a real token, and padding on the left only")
            self._first = self._origin = first
        document_ids, position_ids = self._prompt_ids
        if document_ids is not None:
            in_last = first_real(document_ids == document_ids[:, -1:])
            self._first = in_last if self._first is None else torch.maximum(self._first, in_last)
        if position_ids is not None:
            self._origin = position_ids.shape[1] - 1 - position_ids[:, -1]
        self._least_origin = 0 if self._origin is None else int(self._origin.min())

    def of_layer(self, layer: int) -> LayerAccess:
        if layer not in self._layers:
            self._layers[layer] = _LayerState(self._first, self._length)
        return self._layers[layer]

    def select_rows(self, rows: Tensor) -> None:
        """Replaces row i by row rows[i]; rows [N] int64 may repeat and drop rows."""
        for state in self._layers.values():
            state.select_rows(rows)
        if self._origin is not None:
            self._origin = self._origin[rows]
            self._least_origin = int(self._origin.min())

    def n_bytes(self) -> int:
        """Memory of the caches."""
        return sum(state.n_bytes() for state in self._layers.values())


class _LayerState(WholeSequence):
    """Attends to a prompt as `WholeSequence` does, and caches its keys and values."""

    def __init__(self, first: Tensor | None, n_prompt: int) -> None:
        self._first, self._n_prompt = first, n_prompt
        self._preceding: Tensor | None = None
        """[B, n_tokens, C]: see `preceding`."""
        self._cache: AttentionCache | None = None
        self._source: CrossKeys | None = None

    def preceding(self, last: Tensor, n_tokens: int) -> Tensor | None:
        before = self._preceding
        if before is not None:
            self._preceding = torch.cat([before, last], dim=1)[:, -n_tokens:]
            return before
        if self._first is not None:
            index = torch.arange(self._n_prompt - last.shape[1], self._n_prompt, device=last.device)
            last = last.masked_fill((index < self._first.unsqueeze(1)).unsqueeze(-1), 0)
        self._preceding = F.pad(last, (0, 0, n_tokens - last.shape[1], 0))
        return None

    def bucket_attention(self, q: Tensor, k: Tensor | None, v: Tensor, exchange: Exchange) -> Tensor:
        assert isinstance(exchange, LocalExchange)
        options = exchange.options
        ids, query_ids = exchange.bucket_ids, exchange.query_ids
        if isinstance(self._cache, BucketCache):
            return self._cache.attend(q, v, ids, k=k, query_ids=query_ids)
        if isinstance(self._cache, WindowCache):
            assert k is not None
            return self._cache.attend(q, k, v)
        if k is None or options.own_keys:
            seen = None  # by later tokens
            if self._first is not None:
                seen = torch.arange(q.shape[2], device=q.device) >= self._first.unsqueeze(1)
            self._cache = BucketCache(q, v, ids, replace(options, document_ids=None), seen, k=k)
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
        if isinstance(self._cache, ExactCache):
            return self._cache.attend(q, k, v)
        self._cache = ExactCache(k, v, self._first)
        return super().exact_attention(q, k, v, options, key_padding_mask)

    def select_rows(self, rows: Tensor) -> None:
        assert self._cache is not None
        self._cache.select_rows(rows)
        self._first = None if self._first is None else self._first[rows]
        self._source = None if self._source is None else self._source.select_rows(rows)
        self._preceding = None if self._preceding is None else self._preceding[rows]

    def n_bytes(self) -> int:
        n_preceding = 0 if self._preceding is None else self._preceding.nbytes
        return n_preceding + sum(cache.n_bytes() for cache in (self._cache, self._source) if cache is not None)
