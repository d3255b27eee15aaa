"""Rotary position embeddings (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10000.0


def rotary_tables(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [..., S, head_dim / 2], float32, of positions [S] or [B, S]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float().unsqueeze(-1) * BASE**-exponent
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + D/2]) of [B, H, S, D] by the angles of their positions, in float32."""
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # the same for all heads
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
