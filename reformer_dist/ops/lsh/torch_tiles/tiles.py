"""Order of the tiles: one in which a batched matrix product covers many tiles at once and wastes little.

A *tile* is `tile_len` slots of one bucket (or a chunk). The queries of a tile attend to the tile itself and to
some tiles before and after it. All pairs of tiles at the same distance form a *column*.

Shallow buckets, those of few tiles, are placed level by level: the first tiles of all of them, then the second
tiles of those that have two, and so on. So the tiles of a level pair with those of the previous level as one run,
and the first tile of a bucket pairs with itself only. Deep buckets follow, one after another, with their tiles in
order. There a tile near a bucket's border is also paired with tiles of another bucket, which the mask hides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from reformer_dist.ops.lsh.partition import Tiling

# Buckets of more tiles are deep: their levels would be thin, and few of their pairs are masked.
MAX_SHALLOW_TILES = 8
# Slots whose rows are gathered together: they fit a core's caches along with their scores.
SPAN_SLOTS = {"cpu": 2**13, "cuda": 2**20}

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Run:
    """Pairs of tiles: tile `queries` + i attends to tile `keys` + i * `key_step`."""

    queries: int
    keys: int
    n_tiles: int
    key_step: int = 1


@dataclass(frozen=True)
class Column:
    """The pairs of a span whose keys are `offset` tiles before their queries in the sorted order."""

    offset: int
    runs: list[Run]
    """The queries of a run follow those of the previous run."""

    @property
    def queries(self) -> slice:
        """Indices of the query tiles."""
        return slice(self.runs[0].queries, self.runs[-1].queries + self.runs[-1].n_tiles)

    @property
    def n_tiles(self) -> int:
        return self.queries.stop - self.queries.start


@dataclass(frozen=True)
class Span:
    """Tiles whose rows are gathered together: [start, stop)."""

    start: int
    stop: int
    columns: list[Column]
    """The first has offset 0 and covers all query tiles in one run."""
    keys: tuple[int, int] | None = None
    """Range of the key tiles, if they are in an order of their own."""

    @property
    def key_tiles(self) -> tuple[int, int]:
        return self.keys or (self.start, self.stop)


@dataclass(frozen=True)
class Placement:
    """The order of the tiles."""

    tile_index: Integers
    """New index of each tile; tiles are listed bucket by bucket."""
    first_deep: int
    """Index of the first tile of a deep bucket."""
    n_tiles: int
    """Including empty tiles at both ends, for tiles without a neighbour there; the last is always empty."""
    spans: list[Span]


def place_tiles(
    tiles: Integers, may_be_shallow: npt.NDArray[np.bool_], tiling: Tiling, span_tiles: int
) -> Placement:
    """Assigns an index to each of the tiles[i] tiles of every bucket i."""
    is_shallow = may_be_shallow & (tiles <= MAX_SHALLOW_TILES) & (tiling.n_after == 0)
    # deepest first, ties by bucket; buckets without tiles come last
    group = np.where(is_shallow, MAX_SHALLOW_TILES - tiles, MAX_SHALLOW_TILES)
    by_depth = np.argsort(np.where(tiles > 0, group, MAX_SHALLOW_TILES + 1).astype(np.uint16), kind="stable")
    n_shallow, n_nonempty = np.count_nonzero(is_shallow & (tiles > 0)), np.count_nonzero(tiles)
    first = np.cumsum(tiles) - tiles
    tile_index = np.empty(int(tiles.sum()), dtype=np.int64)
    end, spans = tiling.n_before, []
    for buckets in _span_groups(by_depth[:n_shallow], tiles, span_tiles):
        spans.append(_place_levels(buckets, tiles, first, tile_index, end, tiling.n_before))
        end = spans[-1].stop
    deep, first_deep = by_depth[n_shallow:n_nonempty], end
    end += int(tiles[deep].sum())
    tile_index[_tiles_of(deep, tiles, first)] = np.arange(first_deep, end)
    spans += consecutive_spans(first_deep, end, tiling, span_tiles)
    return Placement(tile_index, first_deep, end + max(1, tiling.n_after), spans)


def _span_groups(buckets: Integers, tiles: Integers, span_tiles: int) -> Iterator[Integers]:
    """Splits shallow buckets into groups of about a span's number of tiles."""
    depth = tiles[buckets]
    span = (np.cumsum(depth) - depth) // span_tiles
    borders = np.flatnonzero(np.diff(span)) + 1
    for start, stop in pairwise([0, *borders.tolist(), len(buckets)]):
        if stop > start:
            yield buckets[start:stop]


def _place_levels(
    buckets: Integers, tiles: Integers, first: Integers, tile_index: Integers, start: int, n_before: int
) -> Span:
    """Indexes the tiles of buckets, deepest first, level by level from `start`."""
    depth = tiles[buckets]
    sizes = [int(np.count_nonzero(depth > level)) for level in range(int(depth[0]))]
    starts = list(accumulate(sizes, initial=start))
    for level, size in enumerate(sizes):
        tile_index[first[buckets[:size]] + level] = np.arange(starts[level], starts[level + 1])
    columns = []
    for offset in range(min(n_before + 1, len(sizes))):
        runs = (Run(starts[level], starts[level - offset], sizes[level]) for level in range(offset, len(sizes)))
        columns.append(Column(offset, _merge_runs(runs)))
    return Span(start, starts[-1], columns)


def _merge_runs(runs: Iterable[Run]) -> list[Run]:
    """Merges runs whose queries and keys are both contiguous into one product."""
    merged: list[Run] = []
    for run in runs:
        last = merged[-1] if merged else None
        if last and run.queries - last.queries == run.keys - last.keys == last.n_tiles:
            merged[-1] = Run(last.queries, last.keys, last.n_tiles + run.n_tiles)
        else:
            merged.append(run)
    return merged


def _tiles_of(buckets: Integers, tiles: Integers, first: Integers) -> Integers:
    """Positions of the tiles of these buckets in a list of all tiles, bucket by bucket."""
    counts = tiles[buckets]
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first[buckets], counts) + within


def column_offsets(tiling: Tiling) -> list[int]:
    """Offsets of the columns, nearest first: sums of tiles without a far neighbour are as if it had no column."""
    return [*range(tiling.n_before + 1), *range(-1, -tiling.n_after - 1, -1)]


def consecutive_spans(start: int, end: int, tiling: Tiling, span_tiles: int) -> list[Span]:
    """Spans of the tiles in [start, end), each paired with its neighbours."""
    offsets = column_offsets(tiling)
    spans = []
    for first in range(start, end, span_tiles):
        size = min(span_tiles, end - first)
        columns = [Column(offset, [Run(first, first - offset, size)]) for offset in offsets]
        spans.append(Span(first - tiling.n_before, first + size + tiling.n_after, columns))
    return spans


def spans_of_own_keys(n_tiles: int, tiling: Tiling, span_tiles: int) -> list[Span]:
    """Spans of tiles of queries, each of which has copies of the tiles of its keys, in the order of columns."""
    offsets = column_offsets(tiling)
    width = len(offsets)
    size = max(1, span_tiles // width)
    spans = []
    for start in range(0, n_tiles, size):
        stop = min(start + size, n_tiles)
        columns = [
            Column(offset, [Run(start, start * width + c, stop - start, width)])
            for c, offset in enumerate(offsets)
        ]
        spans.append(Span(start, stop, columns, keys=(start * width, stop * width)))
    return spans
