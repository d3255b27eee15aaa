"""From tensors to kernels: all rounds of some units, forward or backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reformer_dist.ops.dropout import signed32
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.triton_kernels.backward import attend_round_backward
from reformer_dist.ops.lsh.triton_kernels.forward import attend_round
from reformer_dist.ops.lsh.triton_kernels.rowwise import merge_rounds, sum_rounds
from reformer_dist.ops.lsh.triton_kernels.tiles import KernelConstants, Tiles
from reformer_dist.ops.lsh.triton_kernels.tuning import tuning_of


@dataclass(frozen=True)
class HeadGroup:
    """Consecutive (batch, head) units of q, k, v [B, H, S, D], with the order of their rounds."""

    options: AttentionOptions
    tiles: Tiles
    first: int

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Into out [B, H, S, D] and lse [B, H, S]; k is None where keys are q / |q|."""
        o, part_lse = self._parts(out), self._parts(lse)
        keys = q if k is None else k
        attend_round[self._grid()](
            q,
            keys,
            v,
            o,
            part_lse,
            *_strides(q, keys, v, out),
            *self._arguments(q),
            **self._flags(q, k, is_backward=False),
        )
        if o is not out:
            merge_rounds(o, part_lse, v, out, lse, self.first, self.tiles.here)

    def attend_backward(
        self,
        inputs: tuple[Tensor, Tensor | None, Tensor, Tensor],
        lse: Tensor,
        delta: Tensor,
        grads: tuple[Tensor, Tensor | None, Tensor],
    ) -> None:
        """From inputs q, k, v, d_out into grads of q, k, v, all [B, H, S, D]; delta = rowsum(dO * o) [B, H, S]."""
        q, k, v, d_out = inputs
        dq, dk, dv = grads
        wholes = (dq, dv) if dk is None else (dq, dv, dk)
        parts = [self._parts(whole) for whole in wholes]
        given = (q, q if k is None else k, v, d_out)
        # without dk there is nothing to write there
        targets, whole_targets = ((x[0], x[-1], x[1]) for x in (parts, wholes))
        attend_round_backward[self._grid()](
            *given,
            lse,
            delta,
            *targets,
            *_strides(*given, *whole_targets),
            *self._arguments(q),
            **self._flags(q, k, is_backward=True),
        )
        for part, whole in zip(parts, wholes, strict=True):
            if part is not whole:
                sum_rounds(part, whole, self.first, self.tiles.here, (d_out, lse) if whole is dv else None)

    def _parts(self, whole: Tensor) -> Tensor:
        """Where rounds write parts [BH, R, S, ...] of the whole [B, H, S, ...]: itself if there is but one."""
        n_units, n_rounds = self.tiles.order.shape[:2]
        if n_rounds == 1:
            return whole
        return torch.empty(n_units, n_rounds, *whole.shape[2:], dtype=whole.dtype, device=whole.device)

    def _grid(self) -> tuple[int, int, int]:
        n_units, n_rounds, n_tiles, _ = self.tiles.table.shape
        return n_tiles, n_rounds, n_units

    def _arguments(self, q: Tensor) -> tuple[Any, ...]:
        tiles, (_, n_heads, seq_len, _) = self.tiles, q.shape
        codes, who = (tiles.order if x is None else x for x in (tiles.codes, tiles.who))
        sizes = (self.first, n_heads, seq_len, tiles.table.shape[2])
        return tiles.order, tiles.table, codes, who, *sizes, self.options.scale, self._draw()

    def _draw(self) -> tuple[int, int, float]:
        """What `pairs.dropout_factors` needs of the options."""
        dropout, seed = self.options.dropout, self.options.dropout_seed
        if dropout == 0:  # of what changes from step to step nothing is compiled in
            return 0, 0, 1.0
        return signed32(seed ^ (seed >> 32)), int(dropout * 2**31), 1 / (1 - dropout)

    def _flags(self, q: Tensor, k: Tensor | None, *, is_backward: bool) -> dict[str, Any]:
        block, n_rounds, head_dim = self.tiles.block, self.tiles.order.shape[1], q.shape[3]
        tuning = tuning_of(head_dim, q.dtype)
        other_block = min(tuning.other_block, max(16, block // 2))
        launch = tuning.backward if is_backward else tuning.forward
        constants = KernelConstants.of(
            self.options, block, other_block, head_dim, n_rounds, shared=k is None, held=self.tiles.are_held
        )
        return {
            "C": constants,
            "num_warps": max(1, launch.n_warps * block // tuning.block),
            "num_stages": 1,
            "maxnreg": launch.max_registers,
        }


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(x.stride()[:3] for x in tensors)
