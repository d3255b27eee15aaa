"""The local part of a sequence, and attention over the whole of it.

By default a model call holds whole sequences (`WholeSequence`). `parallel.SlicedSequence` implements the same
protocol for sequences that are sliced over ranks, and `decoding.DecodingState` for sequences in a KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from reformer_dist.ops.exact_attention import ExactOptions
from reformer_dist.ops.lsh import AttentionOptions, CrossKeys, CrossOptions, attend_locally, cross_attention
from reformer_dist.ops.lsh.attention import Exchange, LocalExchange
from reformer_dist.ops.lsh.bucket_stats import BucketStats, measure_bucket_stats
from reformer_dist.ops.lsh.next_values import document_starts, next_values
from reformer_dist.ops.lsh.sorting import count_buckets


class LayerAccess(Protocol):
    """Attention of one layer over whole sequences.

    Tensors are those of the local tokens: q, k, v [B, H, S, D], key_padding_mask [B, S].
    """

    def preceding(self, last: Tensor, n_tokens: int) -> Tensor | None:
        """[B, n_tokens, C]: vectors of the tokens before the local ones, 0 before the first; None: there are none.

        last [B, min(n_tokens, S), C]: those of the last local tokens. Differentiable.
        """
        ...

    def bucket_attention(self, q: Tensor, k: Tensor | None, v: Tensor, exchange: Exchange) -> Tensor:
        """`ops.lsh.bucket_attention` over the whole sequence, by an exchange of `SequenceAccess.make_exchange`."""
        ...

    def exact_attention(
        self, q: Tensor, k: Tensor, v: Tensor, options: ExactOptions, key_padding_mask: Tensor | None
    ) -> Tensor:
        """Attention to every position of the whole sequence, or every earlier one."""
        ...

    def cross_attention(
        self,
        q: Tensor,
        query_ids: Tensor | None,
        keys: Callable[[], CrossKeys],
        options: CrossOptions,
        sequence_of_keys: SequenceAccess,
    ) -> Tensor:
        """`ops.lsh.cross_attention` to the whole of another sequence.

        keys: computes the keys of its local part, which sequence_of_keys describes; called only if needed.
        """
        ...


class SequenceAccess(Protocol):
    """The sequence of a model call, of which the local tokens are a part."""

    @property
    def n_slices(self) -> int:
        """Number of slices of the sequence."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """[n_slices, ...]: x of every slice, in order of positions. Differentiable."""
        ...

    def positions(self, n_tokens: int, device: torch.device, key_padding_mask: Tensor | None = None) -> Tensor:
        """Positions of the local tokens in their sequences, int64: [n_tokens], or [B, n_tokens] given a mask.

        They count from the first real token of each row; padding before it is at position 0.
        """
        ...

    def preceding(self, last: Tensor, n_tokens: int) -> Tensor | None:
        """As `LayerAccess.preceding`, of what does not belong to a layer."""
        ...

    def document_starts(self, document_ids: Tensor) -> Tensor:
        """Whether each local token is the first of its document, bool [B, S], from their document_ids [B, S]."""
        ...

    def of_layer(self, layer: int) -> LayerAccess:
        """The attention of a layer."""
        ...

    def make_exchange(
        self,
        bucket_ids: Tensor,
        options: AttentionOptions,
        key_padding_mask: Tensor | None,
        query_ids: Tensor | None = None,
    ) -> Exchange:
        """The exchange of an attention call and of its recompute.

        bucket_ids [B, H, R, S] of the local tokens; key_padding_mask [B, S]. query_ids: of the tokens as queries,
        with options.own_keys, where bucket_ids are those of the keys.
        """
        ...

    def bucket_stats(self, bucket_ids: Tensor, n_buckets: int, window: int) -> BucketStats:
        """Statistics of the buckets of the whole sequence."""
        ...


class WholeSequence:
    """Whole sequences: all tokens are local."""

    n_slices = 1

    def gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)

    def positions(self, n_tokens: int, device: torch.device, key_padding_mask: Tensor | None = None) -> Tensor:
        indices = torch.arange(n_tokens, device=device)
        if key_padding_mask is None:
            return indices
        return (indices - first_real(key_padding_mask).unsqueeze(1)).clamp_min(0)

    def preceding(self, last: Tensor, n_tokens: int) -> Tensor | None:
        return None

    def document_starts(self, document_ids: Tensor) -> Tensor:
        return document_starts(document_ids)

    def of_layer(self, layer: int) -> LayerAccess:
        return self

    def make_exchange(
        self,
        bucket_ids: Tensor,
        options: AttentionOptions,
        key_padding_mask: Tensor | None,
        query_ids: Tensor | None = None,
    ) -> Exchange:
        return LocalExchange(bucket_ids, options, key_padding_mask, query_ids)

    def bucket_attention(self, q: Tensor, k: Tensor | None, v: Tensor, exchange: Exchange) -> Tensor:
        assert isinstance(exchange, LocalExchange)
        return attend_locally(q, k, next_values(v, exchange.options.next_value_heads), exchange)

    def exact_attention(
        self, q: Tensor, k: Tensor, v: Tensor, options: ExactOptions, key_padding_mask: Tensor | None
    ) -> Tensor:
        return options.attend(q, k, v, key_padding_mask, first_head=0, n_heads=q.shape[1])

    def cross_attention(
        self,
        q: Tensor,
        query_ids: Tensor | None,
        keys: Callable[[], CrossKeys],
        options: CrossOptions,
        sequence_of_keys: SequenceAccess,
    ) -> Tensor:
        return cross_attention(q, query_ids, keys(), options)

    def bucket_stats(self, bucket_ids: Tensor, n_buckets: int, window: int) -> BucketStats:
        counts = count_buckets(bucket_ids.flatten(0, 1), n_buckets)
        return measure_bucket_stats(bucket_ids, counts, window)


def first_real(key_padding_mask: Tensor) -> Tensor:
    """Index [B] of the first real token of each row of a mask [B, S]; 0 if there is none."""
    return key_padding_mask.int().argmax(dim=1)
