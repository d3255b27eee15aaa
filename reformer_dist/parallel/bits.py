"""Masks as bits: an eighth of a byte for each token."""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHTS = [1 << bit for bit in range(8)]


def pack_bits(mask: Tensor) -> Tensor:
    """bool [..., n] -> uint8 [..., ceil(n / 8)]."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8))
    weights = torch.tensor(WEIGHTS, dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The inverse: uint8 [..., ceil(n / 8)] -> bool [..., n]."""
    weights = torch.tensor(WEIGHTS, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) & weights).ne(0).flatten(-2)[..., :n]
