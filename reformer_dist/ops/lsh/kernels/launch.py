"""From tensors to kernels: one round of some units, forward or backward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reformer_dist.ops.counter_dropout import signed32
from reformer_dist.ops.lsh.kernels.backward import attend_round_backward
from reformer_dist.ops.lsh.kernels.forward import attend_round
from reformer_dist.ops.lsh.kernels.tiles import Constants, Tiles
from reformer_dist.ops.lsh.rules import AttentionOptions

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Softmax:
    """The running softmax of the rows of U units."""

    o: Tensor
    """[U, S, D] float32: sum of 2^(s - top) v."""
    top: Tensor
    """[U, S] largest s, in base 2."""
    weight: Tensor
    """[U, S] sum of 2^(s - top)."""

    @staticmethod
    def empty(n_units: int, v: Tensor) -> Softmax:
        """Uninitialised, for units of v [B, H, S, D]."""
        o = torch.empty(n_units, *v.shape[2:], dtype=torch.float32, device=v.device)
        return Softmax(o, torch.empty_like(o[..., 0]), torch.empty_like(o[..., 0]))


@dataclass(frozen=True)
class Gradients:
    """Float32 sums of the gradients of rows, [U, S, D]; `k` is None for shared keys."""

    q: Tensor
    k: Tensor | None
    v: Tensor


@dataclass(frozen=True)
class Units:
    """Consecutive (batch, head) units of q, k, v [B, H, S, D], with the order of their rounds."""

    options: AttentionOptions
    tiles: Tiles
    first: int
    numbers: Tensor
    """int32 [U] of each unit in its step."""

    @property
    def size(self) -> int:
        return self.tiles.order.shape[0]

    @property
    def n_rounds(self) -> int:
        return self.tiles.order.shape[1]

    def attend(
        self,
        round_: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax: Softmax,
        *,
        is_first: bool,
        result: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Merges one round into the softmax or, at last, into result = (out [B, H, S, D], lse [B, H, S])."""
        out, lse = (softmax.o, softmax.top) if result is None else result
        attend_round[self._grid()](
            q, k, v, out, lse, softmax.o, softmax.top, softmax.weight,
            *(x.stride()[:3] for x in (q, k, v, out)),
            *self._arguments(round_, q),
            self._draw(),
            **self._flags(q, is_first=is_first, is_last=result is not None, shared=False),
        )  # fmt: skip

    def attend_backward(
        self,
        round_: int,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor],
        lse: Tensor,
        delta: Tensor,
        sums: Gradients,
        *,
        is_first: bool,
        result: tuple[Tensor, Tensor | None, Tensor] | None,
    ) -> None:
        """Adds one round's gradients to the sums or, at last, makes the result: those of q, k, v [B, H, S, D].

        inputs: q, k, v, d_out [B, H, S, D]. Without sums of k, what belongs to keys goes on to q = |q| k.
        """
        shared = sums.k is None
        totals = [sums.q, sums.q if sums.k is None else sums.k, sums.v]
        outs = totals if result is None else [result[0], result[0] if result[1] is None else result[1], result[2]]
        attend_round_backward[self._grid()](
            *inputs, lse, delta, *outs, *totals,
            *(x.stride()[:3] for x in (*inputs, *outs)),
            *self._arguments(round_, inputs[0], self.options.scale),
            self._draw(),
            **self._flags(inputs[0], is_first=is_first, is_last=result is not None, shared=shared),
        )  # fmt: skip

    def _grid(self) -> tuple[int, int]:
        return self.tiles.table.shape[2], self.size

    def _arguments(self, round_: int, q: Tensor, *scales: float) -> tuple[Any, ...]:
        tiles = self.tiles
        codes = tiles.order if tiles.codes is None else tiles.codes
        sizes = (self.first, q.shape[1], q.shape[2], tiles.table.shape[2], round_)
        return tiles.order, tiles.table, codes, self.numbers, *sizes, *scales, self.options.scale * LOG2_E

    def _draw(self) -> tuple[int, int, float]:
        """Seed, threshold and factor of `pairs.dropout_factors`."""
        dropout, seed = self.options.dropout, self.options.dropout_seed
        return signed32(seed ^ (seed >> 32)), int(dropout * 2**31), 1 / (1 - dropout)

    def _flags(self, q: Tensor, *, is_first: bool, is_last: bool, shared: bool) -> dict[str, Any]:
        constants = Constants.of(self.options, self.tiles.block, q.shape[3], self.n_rounds, shared=shared)
        n_warps = 4 if constants.block_d <= 64 and q.dtype != torch.float32 else 8
        return {"FIRST": is_first, "LAST": is_last, "C": constants, "num_warps": n_warps, "num_stages": 2}
