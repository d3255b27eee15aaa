"""Rows of bytes with several fields each, so that one message holds all vectors of a token."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 4  # bytes


class RowFormat:
    """Named fields of a row, (dtype, width) each, aligned to 4 bytes."""

    def __init__(self, **fields: tuple[torch.dtype, int]) -> None:
        self._fields: dict[str, tuple[torch.dtype, slice, int]] = {}
        offset = 0
        for name, (dtype, width) in fields.items():
            size = -(-width * dtype.itemsize // ALIGNMENT) * ALIGNMENT
            self._fields[name] = (dtype, slice(offset, offset + size), width)
            offset += size
        self.nbytes = offset

    def pack(self, **values: Tensor) -> Tensor:
        """uint8 [n, nbytes] from one tensor [n, width] (or [n]) per field."""
        first = next(iter(values.values()))
        rows = torch.empty(first.shape[0], self.nbytes, dtype=torch.uint8, device=first.device)
        for name, value in values.items():
            self.field(rows, name).copy_(value if value.dim() == 2 else value.unsqueeze(1))
        return rows

    def field(self, rows: Tensor, name: str) -> Tensor:
        """The field [n, width] of rows, as a view."""
        dtype, columns, width = self._fields[name]
        return rows[:, columns].view(dtype)[:, :width]


WEIGHTS = [1 << bit for bit in range(8)]


def pack_bits(mask: Tensor) -> Tensor:
    """bool [..., n] -> uint8 [..., ceil(n / 8)]."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8))
    weights = torch.tensor(WEIGHTS, dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 [..., ceil(n / 8)] -> bool [..., n]."""
    weights = torch.tensor(WEIGHTS, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) & weights).ne(0).flatten(-2)[..., :n]
