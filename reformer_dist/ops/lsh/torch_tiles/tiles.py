"""Where tiles are put: in an order in which one matrix product serves many tiles at once and wastes little.

A *tile* is `tile_len` slots of one bucket (or a chunk). The queries of a tile look at the tile itself and at
some before it and behind it: all pairs of tiles that are one distance apart make up a *column*.

Shallow buckets, those of a few tiles, lie level by level: the first tiles of all of them, then the second ones
of those that have two, and so on. So the tiles of a level meet those of the level below as one run, and a
bucket's first tile looks at itself alone. Deep buckets lie one behind the other, each in the order of its
tiles: there a tile near a bucket's border meets some of another bucket, which the mask has to hide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from reformer_dist.ops.lsh.partition import Tiling

# Buckets of more tiles are deep. Levels get thin with depth, and a deep bucket hides little of itself.
MAX_SHALLOW_TILES = 8
# Slots whose rows are gathered together: as many as stay in the caches of a core with their scores.
SPAN_SLOTS = {"cpu": 2**13, "cuda": 2**20}

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Run:
    """Pairs of consecutive tiles: tile `queries` + i looks at tile `keys` + i."""

    queries: int
    keys: int
    n_tiles: int


@dataclass(frozen=True)
class Column:
    """The pairs of a span whose keys stand `offset` tiles before their queries in the order of the round."""

    offset: int
    runs: list[Run]
    """The queries of one run follow those of the run before it."""

    @property
    def queries(self) -> slice:
        """Numbers of the tiles of queries."""
        return slice(self.runs[0].queries, self.runs[-1].queries + self.runs[-1].n_tiles)

    @property
    def n_tiles(self) -> int:
        return self.queries.stop - self.queries.start


@dataclass(frozen=True)
class Span:
    """Tiles whose rows are gathered together: numbers from start to before stop."""

    start: int
    stop: int
    columns: list[Column]
    """The first one is that of offset 0 and has all tiles of queries, in one run."""


@dataclass(frozen=True)
class Placement:
    """Where the tiles of buckets are put."""

    number: Integers
    """Number of each tile, of bucket after bucket."""
    first_deep: int
    """The number from which on the tiles are those of deep buckets."""
    n_tiles: int
    """Of all, with empty ones at both ends, for tiles that have no neighbour there; the last is always empty."""
    spans: list[Span]


def place_tiles(
    tiles: Integers, may_be_shallow: npt.NDArray[np.bool_], tiling: Tiling, span_tiles: int
) -> Placement:
    """Puts the tiles[i] tiles of each bucket i in their places."""
    is_shallow = may_be_shallow & (tiles <= MAX_SHALLOW_TILES) & (tiling.n_after == 0)
    # deepest first, and of equals the earlier; those without a tile come last
    group = np.where(is_shallow, MAX_SHALLOW_TILES - tiles, MAX_SHALLOW_TILES)
    by_depth = np.argsort(np.where(tiles > 0, group, MAX_SHALLOW_TILES + 1).astype(np.uint16), kind="stable")
    n_shallow, n_taken = np.count_nonzero(is_shallow & (tiles > 0)), np.count_nonzero(tiles)
    first = np.cumsum(tiles) - tiles
    number = np.empty(int(tiles.sum()), dtype=np.int64)
    end, spans = tiling.n_before, []
    for buckets in _groups(by_depth[:n_shallow], tiles, span_tiles):
        spans.append(_place_levels(buckets, tiles, first, number, end, tiling.n_before))
        end = spans[-1].stop
    deep, first_deep = by_depth[n_shallow:n_taken], end
    end += int(tiles[deep].sum())
    number[_tiles_of(deep, tiles, first)] = np.arange(first_deep, end)
    spans += consecutive_spans(first_deep, end, tiling, span_tiles)
    return Placement(number, first_deep, end + max(1, tiling.n_after), spans)


def _groups(buckets: Integers, tiles: Integers, span_tiles: int) -> Iterator[Integers]:
    """Shallow buckets, parted so that each part has about as many tiles as a span."""
    depth = tiles[buckets]
    span = (np.cumsum(depth) - depth) // span_tiles
    borders = np.flatnonzero(np.diff(span)) + 1
    for start, stop in pairwise([0, *borders.tolist(), len(buckets)]):
        if stop > start:
            yield buckets[start:stop]


def _place_levels(
    buckets: Integers, tiles: Integers, first: Integers, number: Integers, start: int, back: int
) -> Span:
    """Numbers the tiles of buckets, deepest first, level by level from `start`."""
    depth = tiles[buckets]
    sizes = [int(np.count_nonzero(depth > level)) for level in range(int(depth[0]))]
    starts = list(accumulate(sizes, initial=start))
    for level, size in enumerate(sizes):
        number[first[buckets[:size]] + level] = np.arange(starts[level], starts[level + 1])
    columns = []
    for offset in range(min(back + 1, len(sizes))):
        runs = (Run(starts[level], starts[level - offset], sizes[level]) for level in range(offset, len(sizes)))
        columns.append(Column(offset, _joined(runs)))
    return Span(start, starts[-1], columns)


def _joined(runs: Iterable[Run]) -> list[Run]:
    """As few runs as have the pairs of these: what follows one another in queries and in keys is one product."""
    joined: list[Run] = []
    for run in runs:
        last = joined[-1] if joined else None
        if last and run.queries - last.queries == run.keys - last.keys == last.n_tiles:
            joined[-1] = Run(last.queries, last.keys, last.n_tiles + run.n_tiles)
        else:
            joined.append(run)
    return joined


def _tiles_of(buckets: Integers, tiles: Integers, first: Integers) -> Integers:
    """Of each bucket in turn, the places of its tiles in an order of all buckets."""
    counts = tiles[buckets]
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first[buckets], counts) + within


def consecutive_spans(start: int, end: int, tiling: Tiling, span_tiles: int) -> list[Span]:
    """Spans of the tiles from start to before end, each of which looks at its neighbours."""
    # nearest first: tiles without a neighbour far before them sum as if there were no such column
    offsets = (*range(tiling.n_before + 1), *range(-1, -tiling.n_after - 1, -1))
    spans = []
    for first in range(start, end, span_tiles):
        size = min(span_tiles, end - first)
        columns = [Column(offset, [Run(first, first - offset, size)]) for offset in offsets]
        spans.append(Span(first - tiling.n_before, first + size + tiling.n_after, columns))
    return spans
