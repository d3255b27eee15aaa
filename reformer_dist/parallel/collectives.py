"""Head exchange: from slices of the sequence with all heads to longer slices with 1 / P of the heads, and back.

One all-to-all each way (DeepSpeed-Ulysses, arXiv 2309.14509): [B, H, S / P, D] <-> [B, H / P, S, D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reformer_dist.distributed.comm import CommGroup
from reformer_dist.distributed.mesh import SequenceMesh
from reformer_dist.ops.profiling import part

PHASE, GATHER_PHASE = "heads", "gather"


def to_heads(x: Tensor, comm: CommGroup, order: list[int]) -> Tensor:
    """[B, H, S, ...] -> [B, H / P, P * S, ...]; order[i]: the rank whose slice is the i-th. Differentiable."""
    out: Tensor = _HeadExchange.apply(x, comm, order, True)
    return out


def to_slices(x: Tensor, comm: CommGroup, order: list[int]) -> Tensor:
    """The inverse of `to_heads`."""
    out: Tensor = _HeadExchange.apply(x, comm, order, False)
    return out


class _HeadExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: CommGroup, order: list[int], is_to_heads: bool) -> Tensor:
        ctx.settings = (comm, order, is_to_heads)
        with comm.stats.timed(PHASE), part("exchange"):
            return (_to_heads if is_to_heads else _to_slices)(x, comm, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        comm, order, is_to_heads = ctx.settings
        with comm.stats.timed(PHASE), part("exchange"):
            return (_to_slices if is_to_heads else _to_heads)(grads[0], comm, order), None, None, None


def _to_heads(x: Tensor, comm: CommGroup, order: list[int]) -> Tensor:
    received = comm.all_to_all(x.unflatten(1, (comm.size, -1)).movedim(1, 0), PHASE)  # [P, B, H / P, S, ...]
    return torch.cat([received[rank] for rank in order], dim=2)


def _to_slices(x: Tensor, comm: CommGroup, order: list[int]) -> Tensor:
    slices = x.chunk(comm.size, dim=2)
    blocks = torch.stack([slices[order.index(rank)] for rank in range(comm.size)])
    return comm.all_to_all(blocks, PHASE).movedim(0, 1).flatten(1, 2)


def gather_slices(x: Tensor, mesh: SequenceMesh) -> Tensor:
    """[P, ...]: x of the rank of each slice, in order of slices. Differentiable; all ranks must run backward."""
    if mesh.size == 1:
        return x.unsqueeze(0)
    out: Tensor = _Gather.apply(x, mesh)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: SequenceMesh) -> Tensor:
        ctx.mesh = mesh
        with part("exchange"):
            by_rank = mesh.sequence_group.all_gather(x, GATHER_PHASE)
        return by_rank[[mesh.rank_of_slice(index) for index in range(mesh.size)]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mesh: SequenceMesh = ctx.mesh
        by_rank = torch.empty_like(grads[0])
        for index, grad in enumerate(grads[0]):
            by_rank[mesh.rank_of_slice(index)] = grad
        with part("exchange"):
            return mesh.sequence_group.all_to_all(by_rank, GATHER_PHASE).sum(dim=0), None
