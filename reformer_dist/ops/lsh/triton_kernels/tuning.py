"""Sizes of groups and tiles, warps and registers per program: the fastest on an H200 (docs/kernels.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Tokens x rounds whose partial results exist at the same time.
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


NARROW = Tuning(64, 32, Launch(4, 96), Launch(4, 168))
WIDE = Tuning(16, 16, Launch(2, 96), Launch(2, 168))
NARROW_FLOAT32 = Tuning(32, 16, Launch(8), Launch(8))
WIDE_FLOAT32 = Tuning(16, 16, Launch(8), Launch(8))


def tuning_of(head_dim: int, dtype: torch.dtype) -> Tuning:
    """Tuning by head_dim (up to 64 or more) and dtype."""
    if dtype == torch.float32:
        return NARROW_FLOAT32 if head_dim <= 64 else WIDE_FLOAT32
    return NARROW if head_dim <= 64 else WIDE
