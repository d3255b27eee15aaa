"""Scratch memory that is used again: asking the system for fresh pages costs more than filling them."""

from __future__ import annotations

import torch
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

    def gather(self, name: str, source: Tensor, index: Tensor) -> Tensor:
        """source[index] in float32; a negative index gives some row."""
        out = self.rows(name, index.numel(), source.shape[1])
        if source.dtype == torch.float32:
            return torch.index_select(source, 0, index.clamp_min(0), out=out)
        return out.copy_(source.index_select(0, index.clamp_min(0)))
