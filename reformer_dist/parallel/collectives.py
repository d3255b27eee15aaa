"""From slices of the sequence with all heads to longer slices with a share of the heads, and back.

One all-to-all each way (DeepSpeed-Ulysses, arXiv 2309.14509): B, H, S / P, D <-> B, H / P, S, D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reformer_dist.distributed.comm import Wire
from reformer_dist.distributed.mesh import SequenceGrid

PHASE = "heads"


def to_heads(x: Tensor, wire: Wire, order: list[int]) -> Tensor:
    """[B, H, S, ...] -> [B, H / P, P * S, ...]; order[i]: the rank whose slice is the i-th. Differentiable."""
    out: Tensor = _HeadExchange.apply(x, wire, order, True)
    return out


def to_slices(x: Tensor, wire: Wire, order: list[int]) -> Tensor:
    """The inverse of `to_heads`."""
    out: Tensor = _HeadExchange.apply(x, wire, order, False)
    return out


class _HeadExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire, order: list[int], is_to_heads: bool) -> Tensor:
        ctx.settings = (wire, order, is_to_heads)
        with wire.ledger.timed(PHASE):
            return (_to_heads if is_to_heads else _to_slices)(x, wire, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wire, order, is_to_heads = ctx.settings
        with wire.ledger.timed(PHASE):
            return (_to_slices if is_to_heads else _to_heads)(grads[0], wire, order), None, None, None


def _to_heads(x: Tensor, wire: Wire, order: list[int]) -> Tensor:
    received = wire.swap(x.unflatten(1, (wire.size, -1)).movedim(1, 0), PHASE)  # [P, B, H / P, S, ...]
    return torch.cat([received[rank] for rank in order], dim=2)


def _to_slices(x: Tensor, wire: Wire, order: list[int]) -> Tensor:
    slices = x.chunk(wire.size, dim=2)
    blocks = torch.stack([slices[order.index(rank)] for rank in range(wire.size)])
    return wire.swap(blocks, PHASE).movedim(0, 1).flatten(1, 2)


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
