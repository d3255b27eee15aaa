"""Scratch memory that is used again, since fresh pages cost more than filling them; and rows brought together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Workspace:
    """Named float32 buffers that live for one call. Asking again for a name takes back what it last gave."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def rows(self, name: str, n_rows: int, width: int) -> Tensor:
        """Uninitialised [n_rows, width]."""
        size = n_rows * width
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            # a tenth more, since the next round needs nearly, not exactly, as much
            buffer = torch.empty(size + size // 10, dtype=torch.float32, device=self._device)
            self._buffers[name] = buffer
        return buffer[:size].view(n_rows, width)


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index]: [m, D] of float32 rows [n, D] and index [m] int64, not negative."""
    if rows.is_cuda:
        return rows.index_select(0, index)
    # bags of one row each: of PyTorch's ways to gather, the one that uses all cores and fetches ahead
    return F.embedding_bag(index, rows, torch.arange(index.numel()), mode="sum")
