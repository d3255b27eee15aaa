"""Attention among the rows that one part holds of an order whose other rows are elsewhere.

Every round's order is that of all rows, wherever they are; a part owns a run of it (`runs`). Its rows are those
that any round needs here. In a round they may be queries, keys only, or absent, so their softmax is partial:
output and logsumexp are those of what is met here, and gradients what is owed to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from reformer_dist.ops.lsh.options import WindowRule
from reformer_dist.ops.lsh.partition import Partition, choose_tiling, window_partition


@dataclass(frozen=True)
class Rows:
    """Who the rows of a group are: tokens of some units."""

    unit: Tensor
    """[n_rows] number of the (batch row, head) in its step: row * n_heads + head."""
    position: Tensor
    """[n_rows] in the whole sequence."""
    codes: Tensor | None = None
    """With count_pairs_once: [R, n_rows] codes of the rows' places in every round, see `order.position_codes`."""


@dataclass(frozen=True)
class HeldRows:
    """Who the rows are, in any order that keeps those of a unit by position, and where they stand."""

    rows: Rows
    keys: list[Tensor]
    """Of each round [n_rows]: see `order.row_sort_keys`."""
    total: Tensor
    """[BH, R, K] members of each bucket over all parts."""
    seq_len: int
    """Of the whole order."""
    part: Partition

    def query_bounds(self, rule: WindowRule) -> Tensor:
        """int32 [R, BH * K, 2]: how many of a bucket's members here stand before its queries, before their end."""
        tile_len = choose_tiling(rule, self.seq_len, self.total.shape[2]).tile_len
        bounds = []
        for total in self.total.unbind(dim=1):
            run = window_partition(total, rule, tile_len, self.part)
            bounds.append(torch.stack([run.query_start - run.start, run.query_stop - run.start], dim=-1))
        return torch.stack(bounds).flatten(1, 2).int()


class HeldAttention(Protocol):
    """Rows [n_rows, D]; k and dk are None for shared query-key attention, whose keys are q / |q|."""

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output [n_rows, D] and logsumexp [n_rows] of all rounds; of who meets nobody here, any and inf."""
        ...

    def attend_backward(
        self, q: Tensor, k: Tensor | None, v: Tensor, d_out: Tensor, *, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """dq, dk, dv from dO, and lse and delta = rowsum(dO * o) of the whole softmax, float32 [n_rows].

        lse = inf and dO = 0 silence a row as a query.
        """
        ...
