"""The part of the sequence that a model call has at hand, and how attention reaches the rest.

A model that holds whole sequences uses `WholeSequence`. One whose sequences lie on several ranks is given
another object with the same methods, and knows no more about it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from reformer_dist.ops.exact_attention import ExactOptions
from reformer_dist.ops.lsh import AttentionOptions, bucket_attention
from reformer_dist.ops.lsh.health import LSHHealth, measure_health
from reformer_dist.ops.lsh.order import count_buckets


class SequenceAccess(Protocol):
    """Tensors are those of the tokens at hand: q, k, v [B, H, S, D], key_padding_mask [B, S]."""

    def positions(self, n_tokens: int, device: torch.device) -> Tensor:
        """Positions of the tokens at hand in the whole sequence, [n_tokens] int64."""
        ...

    def bucket_attention(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
        bucket_ids: Tensor,
        options: AttentionOptions,
        key_padding_mask: Tensor | None,
        kept: dict[str, Any],
    ) -> Tensor:
        """`ops.lsh.bucket_attention` over the whole sequence; `kept` carries plans from a run to its recompute."""
        ...

    def exact_attention(
        self, q: Tensor, k: Tensor, v: Tensor, options: ExactOptions, key_padding_mask: Tensor | None
    ) -> Tensor:
        """Attention to every position of the whole sequence, or every earlier one."""
        ...

    def health(self, bucket_ids: Tensor, n_buckets: int, window: int) -> LSHHealth:
        """Health of the hashing of the whole sequence."""
        ...


class WholeSequence:
    """All tokens are at hand."""

    def positions(self, n_tokens: int, device: torch.device) -> Tensor:
        return torch.arange(n_tokens, device=device)

    def bucket_attention(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
        bucket_ids: Tensor,
        options: AttentionOptions,
        key_padding_mask: Tensor | None,
        kept: dict[str, Any],
    ) -> Tensor:
        return bucket_attention(q, k, v, bucket_ids, options, key_padding_mask)

    def exact_attention(
        self, q: Tensor, k: Tensor, v: Tensor, options: ExactOptions, key_padding_mask: Tensor | None
    ) -> Tensor:
        return options.attend(q, k, v, key_padding_mask, first_head=0, n_heads=q.shape[1])

    def health(self, bucket_ids: Tensor, n_buckets: int, window: int) -> LSHHealth:
        counts = count_buckets(bucket_ids.flatten(0, 1), n_buckets)
        return measure_health(bucket_ids, counts, window)
