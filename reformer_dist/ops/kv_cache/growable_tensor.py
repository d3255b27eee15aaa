"""A tensor that grows along one dimension in amortized constant time per appended row."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_GROWTH = 64


class GrowableTensor:
    """A copy of x with spare capacity, which grows by half when it is full."""

    def __init__(self, x: Tensor, dim: int) -> None:
        self._dim, self.size = dim, x.shape[dim]
        self._buffer = self._grow(x)

    @property
    def filled(self) -> Tensor:
        """The elements, as a view."""
        return self._buffer.narrow(self._dim, 0, self.size)

    def append(self, x: Tensor) -> None:
        """Appends x along the growing dimension."""
        n_added = x.shape[self._dim]
        if self.size + n_added > self._buffer.shape[self._dim]:
            self._buffer = self._grow(self.filled, n_added)
        self._buffer.narrow(self._dim, self.size, n_added).copy_(x)
        self.size += n_added

    def select(self, dim: int, index: Tensor) -> None:
        """Keeps the entries index [N] of another dimension."""
        self._buffer = self._buffer.index_select(dim, index)

    def n_bytes(self) -> int:
        return self._buffer.nbytes

    def _grow(self, x: Tensor, n_added: int = 0) -> Tensor:
        """A copy of x with capacity for n_added more and half as much again."""
        size, shape = x.shape[self._dim] + n_added, [*x.shape]
        shape[self._dim] = size + max(MIN_GROWTH, size // 2)
        # zeros, not empty: unused slots may be read, with weight 0
        buffer = torch.zeros(shape, dtype=x.dtype, device=x.device)
        buffer.narrow(self._dim, 0, x.shape[self._dim]).copy_(x)
        return buffer
