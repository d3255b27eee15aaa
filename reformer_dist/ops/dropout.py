"""Dropout whose mask is a function of a seed: the recompute of a reversible layer draws the same one."""

from __future__ import annotations

import torch
from torch import Tensor


def seeded_dropout(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Zeroes a share `dropout` of x and scales the rest; the global random state is neither read nor moved."""
    if dropout == 0.0:
        return x
    generator = torch.Generator(device=x.device).manual_seed(seed)
    noise = torch.rand(x.shape, generator=generator, device=x.device)
    return x * (noise >= dropout).to(x.dtype).div_(1.0 - dropout)
