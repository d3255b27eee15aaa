"""What attention remembers of a text while it is written: one cache for each kind, all with the same methods.

A cache is made from a prompt and then attends for one more token of each row at a time, giving what attention
over the whole text gives at that token.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from reformer_dist.ops.kv_cache.bucket_cache import BucketCache
from reformer_dist.ops.kv_cache.exact_cache import ExactCache
from reformer_dist.ops.kv_cache.window_cache import WindowCache

__all__ = ["AttentionCache", "BucketCache", "ExactCache", "WindowCache"]


class AttentionCache(Protocol):
    """Of one layer."""

    def select_rows(self, rows: Tensor) -> None:
        """Makes row i what row rows[i] was: rows [N] int64 may repeat some and leave others out."""
        ...

    def n_bytes(self) -> int:
        """Memory held."""
        ...
