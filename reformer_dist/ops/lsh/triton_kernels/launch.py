"""Launches of the attention kernels: all rounds of a group of heads, forward or backward."""

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
    """Consecutive (batch row, head) pairs of q, k, v [B, H, S, D], with the tiles of their rounds."""

    options: AttentionOptions
    tiles: Tiles
    first: int
    """Index of the first: batch row * H + head."""

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Writes out [B, H, S, D] and lse [B, H, S]; k is None where keys are q / |q|."""
        o, round_lse = self._round_buffer(out), self._round_buffer(lse)
        keys = q if k is None else k
        attend_round[self._grid()](
            q, keys, v, o, round_lse, *_strides(q, keys, v, out),
            *self._arguments(q), **self._flags(q, k, is_backward=False),
        )  # fmt: skip
        if o is not out:
            merge_rounds(o, round_lse, out, lse, self.first, self.tiles.present)

    def attend_backward(
        self, q: Tensor, k: Tensor | None, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor,
        dq: Tensor, dk: Tensor | None, dv: Tensor,
    ) -> None:  # fmt: skip
        """Writes the gradients of q, k, v [B, H, S, D]; delta = rowsum(dO * o) [B, H, S]."""
        outputs = (dq, dv) if dk is None else (dq, dv, dk)
        buffers = [self._round_buffer(output) for output in outputs]
        read = (q, q if k is None else k, v, d_out)
        # without dk, the kernel does not write to its pointer
        written, written_strides = ((x[0], x[-1], x[1]) for x in (buffers, outputs))
        attend_round_backward[self._grid()](
            *read, lse, delta, *written, *_strides(*read, *written_strides),
            *self._arguments(q), **self._flags(q, k, is_backward=True),
        )  # fmt: skip
        for buffer, output in zip(buffers, outputs, strict=True):
            if buffer is not output:
                sum_rounds(buffer, output, self.first, self.tiles.present, lse if output is dv else None)

    def _round_buffer(self, output: Tensor) -> Tensor:
        """Buffer of the rounds for an output [B, H, S, ...]: [BH, R, S, ...], or with one round the output."""
        n_heads, n_rounds = self.tiles.order.shape[:2]
        if n_rounds == 1:
            return output
        return torch.empty(n_heads, n_rounds, *output.shape[2:], dtype=output.dtype, device=output.device)

    def _grid(self) -> tuple[int, int, int]:
        n_heads, n_rounds, n_entries, _ = self.tiles.table.shape
        return n_entries, n_rounds, n_heads

    def _arguments(self, q: Tensor) -> tuple[Any, ...]:
        """The arguments of both kernels from order_ptr on."""
        tiles, (_, n_heads, seq_len, _) = self.tiles, q.shape
        codes, token_ids = (tiles.order if x is None else x for x in (tiles.codes, tiles.token_ids))
        sizes = (self.first, n_heads, seq_len, tiles.table.shape[2])
        return tiles.order, tiles.table, codes, token_ids, *sizes, self.options.scale, *self._dropout()

    def _dropout(self) -> tuple[int, int, float]:
        """The fields of `pair_mask.Dropout`."""
        dropout, seed = self.options.dropout, self.options.dropout_seed
        if dropout == 0:
            return 0, 0, 1.0
        return signed32(seed ^ (seed >> 32)), int(dropout * 2**31), 1 / (1 - dropout)

    def _flags(self, q: Tensor, k: Tensor | None, *, is_backward: bool) -> dict[str, Any]:
        block, n_rounds, head_dim = self.tiles.block, self.tiles.order.shape[1], q.shape[3]
        tuning = tuning_of(head_dim, q.dtype)
        other_block = min(tuning.other_block, max(16, block // 2))
        launch = tuning.backward if is_backward else tuning.forward
        constants = KernelConstants.of(
            self.options, block, other_block, head_dim, n_rounds, shared=k is None, sharded=self.tiles.is_partition
        )
        return {
            "C": constants,
            "num_warps": max(1, launch.n_warps * block // tuning.block),
            "num_stages": 1,
            "maxnreg": launch.max_registers,
        }


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(x.stride()[:3] for x in tensors)
