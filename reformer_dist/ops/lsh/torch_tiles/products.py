"""Batched matrix products over the pairs of tiles of a span, one call per run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from reformer_dist.ops.lsh.torch_tiles.layout import Layout
from reformer_dist.ops.lsh.torch_tiles.tiles import Run, Span
from reformer_dist.ops.workspace import Workspace, gather_rows

Views = Sequence[Tensor]
"""The tiles of each run of a span: [n, tile_len, width] each."""


class Pairs:
    """The pairs of tiles of a span, column by column, and buffers [pairs, tile_len, tile_len] for them."""

    def __init__(self, layout: Layout, span: Span, scratch: Workspace) -> None:
        self._scratch, self._tile_len, self.columns = scratch, layout.tiling.tile_len, span.columns
        self._runs: list[Run] = [run for column in span.columns for run in column.runs]
        self._run_sizes = [run.n_tiles for run in self._runs]
        self._column_sizes = [column.n_tiles for column in span.columns]

    def buffer(self, name: str) -> Tensor:
        n_pairs, tile_len = sum(self._run_sizes), self._tile_len
        return self._scratch.rows(name, n_pairs * tile_len, tile_len).view(n_pairs, tile_len, tile_len)

    def by_run(self, pairs: Tensor) -> Views:
        return pairs.split(self._run_sizes)

    def by_column(self, pairs: Tensor) -> Sequence[Tensor]:
        return pairs.split(self._column_sizes)

    def by_queries(self, tiles: Tensor) -> list[Tensor]:
        """The tiles of queries [tiles, ...] that are in each column."""
        first = self.columns[0].queries.start
        return [tiles[c.queries.start - first : c.queries.stop - first] for c in self.columns]

    def at_queries(self, tiles: Tensor, first: int = 0) -> Views:
        """Query tiles of each run, as views of tiles [n, tile_len, width] that start with tile `first`."""
        return [tiles.narrow(0, run.queries - first, run.n_tiles) for run in self._runs]

    def at_keys(self, tiles: Tensor, first: int = 0) -> Views:
        """Key tiles of each run, likewise."""
        return [tiles[run.keys - first :: run.key_step][: run.n_tiles] for run in self._runs]


def gather_tiles(rows: Tensor, slots: Tensor, tile_len: int, start: int, stop: int) -> Tensor:
    """[tiles, tile_len, D] from rows [n_rows, D] in slots of tiles; empty slots must hold a valid row."""
    gathered = gather_rows(rows, slots[start * tile_len : stop * tile_len])
    return gathered.view(-1, tile_len, rows.shape[1])


def transposed(views: Views) -> Views:
    return [view.transpose(1, 2) for view in views]


def set_products(targets: Views, left: Views, right: Views) -> None:
    """targets = left @ right, run by run."""
    for target, x, y in zip(targets, left, right, strict=True):
        torch.bmm(x, y, out=target)


def add_products(targets: Iterable[Tensor], left: Iterable[Tensor], right: Iterable[Tensor]) -> None:
    """targets += left @ right, run by run."""
    for target, x, y in zip(targets, left, right, strict=True):
        target.baddbmm_(x, y)


def sum_products(targets: Views, left: Views, right: Views) -> None:
    """Like `add_products`, with uninitialized targets: the first run covers all tiles and overwrites them."""
    torch.bmm(left[0], right[0], out=targets[0])
    add_products(targets[1:], left[1:], right[1:])
