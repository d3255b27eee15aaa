"""What each slice of a sequence has for a small tensor, on every rank that shares it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reformer_dist.distributed.grid import SequenceGrid

PHASE = "gather"


def gather_slices(x: Tensor, grid: SequenceGrid) -> Tensor:
    """[P, ...]: x of the rank of each slice, in their order. Differentiable; every rank must go backward."""
    if grid.size == 1:
        return x.unsqueeze(0)
    out: Tensor = _Gather.apply(x, grid)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: SequenceGrid) -> Tensor:
        ctx.grid = grid
        return grid.sequence_wire.gather(x, PHASE)[[grid.rank_of_slice(index) for index in range(grid.size)]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grid: SequenceGrid = ctx.grid
        by_rank = torch.empty_like(grads[0])
        for index, grad in enumerate(grads[0]):
            by_rank[grid.rank_of_slice(index)] = grad
        return grid.sequence_wire.swap(by_rank, PHASE).sum(dim=0), None
