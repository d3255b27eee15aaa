"""Rows of bytes that hold several vectors each, so that one message carries all that a token needs."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 4  # bytes


class Record:
    """Named fields of a row: (dtype, width) each, at offsets that suit their dtype."""

    def __init__(self, **fields: tuple[torch.dtype, int]) -> None:
        self._fields: dict[str, tuple[torch.dtype, slice, int]] = {}
        offset = 0
        for name, (dtype, width) in fields.items():
            size = -(-width * dtype.itemsize // ALIGNMENT) * ALIGNMENT
            self._fields[name] = (dtype, slice(offset, offset + size), width)
            offset += size
        self.nbytes = offset

    def pack(self, **values: Tensor) -> Tensor:
        """uint8 [n, nbytes] of one tensor [n, width] (or [n]) for each field."""
        some = next(iter(values.values()))
        rows = torch.empty(some.shape[0], self.nbytes, dtype=torch.uint8, device=some.device)
        for name, value in values.items():
            self.field(rows, name).copy_(value if value.dim() == 2 else value.unsqueeze(1))
        return rows

    def field(self, rows: Tensor, name: str) -> Tensor:
        """The field [n, width] of rows, as a view."""
        dtype, place, width = self._fields[name]
        return rows[:, place].view(dtype)[:, :width]
