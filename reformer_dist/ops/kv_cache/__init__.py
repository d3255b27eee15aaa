"""KV caches for incremental decoding, one class per kind of attention.

A cache is built from a prompt. Each call of `attend` then takes one more token per row and returns the output of
attention over the whole sequence at that token.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from reformer_dist.ops.kv_cache.bucket_cache import BucketCache
from reformer_dist.ops.kv_cache.exact_cache import ExactCache
from reformer_dist.ops.kv_cache.window_cache import WindowCache

__all__ = ["AttentionCache", "BucketCache", "ExactCache", "WindowCache"]


class AttentionCache(Protocol):
    """KV cache of one layer."""

    def select_rows(self, rows: Tensor) -> None:
        """Replaces row i by row rows[i]; rows [N] int64 may repeat and drop rows."""
        ...

    def n_bytes(self) -> int:
        """Memory of the cache."""
        ...
