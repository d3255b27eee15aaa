"""Sizes of groups and tiles, warps and registers per program: the fastest on an H200 (docs/kernels.md).

Does not import Triton, so that a run on a GPU can be planned without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reformer_dist.ops.lsh.attention import WorkspaceShape
from reformer_dist.ops.lsh.neighbour_rules import Rule, WindowRule

# Shorter sequences are bound by the host, and take one launch of tiles in place of two (Split).
SPLIT_SEQ_LEN = 8192
# Tokens x rounds whose partial results exist at a time.
GROUP_TOKENS = 2**22


@dataclass(frozen=True)
class Launch:
    """Launch parameters of the largest tile; shorter ones take fewer warps."""

    n_warps: int
    max_registers: int | None = None
    """Per thread. Fewer raise occupancy, until they spill."""


@dataclass(frozen=True)
class Tuning:
    block: int
    """Largest number of rows of a tile."""
    other_block: int
    """Largest number of rows of a block beside it."""
    forward: Launch
    backward: Launch
    split: Split | None = None


@dataclass(frozen=True)
class Split:
    """Under a causal window, the first tile of each bucket and the others by programs of their own.

    Half of the buckets of 64 tokens on average overflow a tile of 64, by 7 rows on average. First tiles have no
    rows before them, and their programs no loop over such rows.
    """

    first: Tuning
    tail: Tuning

    def fits(self, rule: Rule, seq_len: int, n_buckets: int) -> bool:
        """Whether the blocks before a tail tile begin in its bucket, and a bucket is about one tile on average."""
        if not isinstance(rule, WindowRule) or not rule.causal or seq_len < SPLIT_SEQ_LEN:
            return False
        block, other_block, members = self.first.block, self.tail.other_block, seq_len // n_buckets
        before = -(-(rule.window - 1) // other_block) * other_block
        return block <= rule.window and before <= block <= members <= 1.25 * block


NARROW_SPLIT = Split(
    first=Tuning(64, 16, Launch(4, 72), Launch(4, 128)), tail=Tuning(16, 16, Launch(1, 128), Launch(1, 168))
)
WIDE_SPLIT = Split(
    first=Tuning(64, 16, Launch(4, 128), Launch(4)), tail=Tuning(16, 16, Launch(2, 96), Launch(2, 168))
)
NARROW = Tuning(64, 32, Launch(4, 96), Launch(4, 168), NARROW_SPLIT)
WIDE = Tuning(16, 16, Launch(2, 96), Launch(2, 168), WIDE_SPLIT)
NARROW_FLOAT32 = Tuning(32, 16, Launch(8), Launch(8))
WIDE_FLOAT32 = Tuning(16, 16, Launch(8), Launch(8))


def tuning_of(head_dim: int, dtype: torch.dtype) -> Tuning:
    """Tuning by head_dim (up to 64 or more) and dtype."""
    if dtype == torch.float32:
        return NARROW_FLOAT32 if head_dim <= 64 else WIDE_FLOAT32
    return NARROW if head_dim <= 64 else WIDE


def workspace_bytes(shape: WorkspaceShape) -> float:
    """`Backend.workspace_bytes`: order, tiles, rowsum(dO * o), a group's scalars and its gradients per round."""
    n_rounds, n_grads = shape.n_rounds, 2 if shape.shared_keys else 3
    vector = shape.head_dim * shape.element_size
    rows: float
    sorted_rows: float
    if shape.n_partition_rows is None:
        sorted_rows = shape.n_heads * shape.seq_len
        other = 4.0 * sorted_rows
        rows = min(shape.n_heads, max(1, GROUP_TOKENS // (n_rounds * shape.seq_len))) * shape.seq_len
    else:
        rows = sorted_rows = shape.n_partition_rows
        other = rows * n_grads * vector
    of_width = tuning_of(shape.head_dim, torch.float32 if shape.element_size == 4 else torch.bfloat16)
    split, block = of_width.split, of_width.block
    is_whole = shape.n_partition_rows is None and not shape.own_keys
    if split is not None and is_whole and split.fits(shape.rule, shape.seq_len, shape.n_buckets):
        block = split.tail.block
    if shape.documents:
        other += 4 * sorted_rows
    n_sides, slot = (1, 4) if not shape.own_keys else (2, 14)  # with their reach, and the queries' last keys
    order = (
        n_rounds * n_sides * (slot * sorted_rows + 16 * (sorted_rows / block + shape.n_heads * shape.n_buckets))
    )
    return order + other + 16 * rows + (rows * n_rounds * n_grads * vector if n_rounds > 1 else 0)
