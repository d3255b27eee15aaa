"""Rotary position embeddings (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from reformer_dist.ops.checks import TensorChecks, check_integer, check_number, one_per_row_or_shared

BASE = 10000.0


def rotary_tables(positions: Tensor, head_dim: int, base: float = BASE) -> tuple[Tensor, Tensor]:
    """cos and sin [..., S, head_dim / 2], float32, of positions [S] or [B, S]. Raises ValueError.

    base: above 1; pair i turns by base**(-2i / head_dim) per position.
    """
    check_integer("head_dim", head_dim, least=2)
    check_number("base", base, above=1)
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim}: must be even, since rotary positions rotate pairs")
    TensorChecks().integers("positions", positions, one_per_row_or_shared(positions, "B S"))
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float().unsqueeze(-1) * base**-exponent
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + D/2]) of [B, H, S, D] by the angles of their positions, in float32.

    cos, sin: `rotary_tables` of the S tokens. Raises ValueError.
    """
    checks = TensorChecks()
    checks.floats("x", x, "B H S D")
    tables = TensorChecks(B=x.shape[0], S=x.shape[2], half=x.shape[3] // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        tables.floats(name, table, one_per_row_or_shared(table, "B S half"))
    if x.shape[3] % 2 or x.device != cos.device:
        raise ValueError(
            f"x.shape={list(x.shape)} on {x.device}: must have an even D, and be on {cos.device} like cos"
        )
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # the same for all heads
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
