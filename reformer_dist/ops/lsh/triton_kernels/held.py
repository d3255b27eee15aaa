"""`ops.lsh.held.HeldAttention` by the kernels, under the window rule."""

from __future__ import annotations

import torch
from torch import Tensor

from reformer_dist.ops.lsh.held import HeldRows
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.triton_kernels.launch import HeadGroup
from reformer_dist.ops.lsh.triton_kernels.tiles import tile_shard
from reformer_dist.ops.lsh.triton_kernels.tuning import tuning_of


class KernelRows:
    """All rows as one unit, tensors [1, 1, n_rows, D]. The host never waits."""

    def __init__(self, held: HeldRows, options: AttentionOptions, head_dim: int, dtype: torch.dtype) -> None:
        self._units = HeadGroup(options, tile_shard(held, options, largest=tuning_of(head_dim, dtype).block), 0)

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
        """In the type of v; the output of who meets nobody is v."""
        out = torch.empty_like(v)
        lse = torch.empty(v.shape[0], dtype=torch.float32, device=v.device)
        if len(v):
            keys = None if k is None else _as_unit(k)
            self._units.attend(_as_unit(q), keys, _as_unit(v), _as_unit(out), lse.view(1, 1, -1))
        return out, lse

    def attend_backward(
        self, q: Tensor, k: Tensor | None, v: Tensor, d_out: Tensor, *, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """In the types of q, k and v."""
        dq, dv = torch.empty_like(q), torch.empty_like(v)
        dk = None if k is None else torch.empty_like(k)
        if len(v):
            inputs = (_as_unit(q), None if k is None else _as_unit(k), _as_unit(v), _as_unit(d_out))
            grads = (_as_unit(dq), None if dk is None else _as_unit(dk), _as_unit(dv))
            self._units.attend_backward(inputs, lse.view(1, 1, -1), delta.view(1, 1, -1), grads)
        return dq, dk, dv


def _as_unit(x: Tensor) -> Tensor:
    return x.view(1, 1, *x.shape)
