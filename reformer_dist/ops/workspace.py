"""Reused scratch buffers, since fresh pages cost more than filling them, and a fast row gather."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HEADROOM = 1.1  # of a buffer, since rounds need similar but not equal sizes


class Workspace:
    """Named float32 buffers for one call; requesting a name again invalidates the buffer returned before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def rows(self, name: str, n_rows: int, width: int) -> Tensor:
        """An uninitialised buffer [n_rows, width]."""
        size = n_rows * width
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(int(size * HEADROOM), dtype=torch.float32, device=self._device)
            self._buffers[name] = buffer
        return buffer[:size].view(n_rows, width)


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index] [m, D] of float32 rows [n, D] and non-negative int64 index [m]."""
    if rows.is_cuda:
        return rows.index_select(0, index)
    # bags of one row each: PyTorch's only CPU gather that is multithreaded and prefetches
    return F.embedding_bag(index, rows, torch.arange(index.numel(), device=index.device), mode="sum")
