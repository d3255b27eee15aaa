"""Sizes of groups and tiles, warps and registers of programs: what was fastest on an H200 (docs/kernels.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Tokens, counted in each round, whose parts exist at a time.
GROUP_TOKENS = 2**22


@dataclass(frozen=True)
class Launch:
    """Of a tile of the most rows; a shorter one takes fewer warps."""

    n_warps: int
    max_registers: int | None = None
    """Of a thread: fewer let more programs run at a time, down to where they spill."""


@dataclass(frozen=True)
class Tuning:
    block: int
    """Most rows of a tile."""
    other_block: int
    """Most rows beside a tile that it is compared with at a time."""
    forward: Launch
    backward: Launch


NARROW = Tuning(64, 32, Launch(4, 96), Launch(4, 168))
WIDE = Tuning(16, 16, Launch(2, 96), Launch(2, 168))
NARROW_FLOAT32 = Tuning(32, 16, Launch(8), Launch(8))
WIDE_FLOAT32 = Tuning(16, 16, Launch(8), Launch(8))


def tuning_of(head_dim: int, dtype: torch.dtype) -> Tuning:
    """Heads up to 64 wide are narrow."""
    if dtype == torch.float32:
        return NARROW_FLOAT32 if head_dim <= 64 else WIDE_FLOAT32
    return NARROW if head_dim <= 64 else WIDE
