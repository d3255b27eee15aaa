"""A tensor that grows along one dimension, by half its size at a time: appending costs a constant on average."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 64


def _room_for(size: int) -> int:
    return size + max(SMALLEST, size // 2)


class GrowableTensor:
    """Starts as a copy of x, with room for more."""

    def __init__(self, x: Tensor, dim: int) -> None:
        self._dim, self.size = dim, x.shape[dim]
        self._room = self._with_room(x, _room_for(self.size))

    @property
    def filled(self) -> Tensor:
        """What was put in: a view."""
        return self._room.narrow(self._dim, 0, self.size)

    def append(self, x: Tensor) -> None:
        """Puts x behind what is there."""
        end = self.size + x.shape[self._dim]
        if end > self._room.shape[self._dim]:
            self._room = self._with_room(self.filled, _room_for(end))
        self._room.narrow(self._dim, self.size, x.shape[self._dim]).copy_(x)
        self.size = end

    def select(self, dim: int, index: Tensor) -> None:
        """Keeps what index [N] names along another dimension."""
        self._room = self._room.index_select(dim, index)

    def n_bytes(self) -> int:
        return self._room.nbytes

    def _with_room(self, x: Tensor, size: int) -> Tensor:
        shape = [*x.shape]
        shape[self._dim] = size
        # zeros: rows that hold nothing yet may be read, and are then given no weight
        room = torch.zeros(shape, dtype=x.dtype, device=x.device)
        room.narrow(self._dim, 0, x.shape[self._dim]).copy_(x)
        return room
