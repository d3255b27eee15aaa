"""One round's order by (bucket, position), laid out in tiles that attention can take as they are.

A *slot* is a place in the laid-out order; it holds a row (a token of some unit) or is empty (-1). A *tile* is
`tile_len` slots; `tiles` says where they are put.

Window rule: every bucket starts on a tile border. So the column in which a query finds a key depends on their
ranks in the bucket alone, never on how full other buckets are, and sums run in the same order whatever the
future holds: strict causality to the last bit. Chunk rule: a tile is a chunk, and empty tiles (or the wrapped
ones) part the units.

Rows of several units are laid out together, in any order that keeps the tokens of a unit by position. A row
may be absent from a round (padding, or a token that this rank does not need there), or stand there as a key
only. The last tile is always empty: rows that are no query in a round have their home there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reformer_dist.ops.lsh.options import AttentionOptions, ChunkRule
from reformer_dist.ops.lsh.partition import ChunkPartition, Partition, Tiling, WindowPartition, chunk_partition, choose_tiling, window_partition
from reformer_dist.ops.lsh.sorting import radix_argsort
from reformer_dist.ops.lsh.torch_tiles.tiles import SPAN_SLOTS, Integers, Span, consecutive_spans, place_tiles


@dataclass(frozen=True)
class Layout:
    """One round of a group of units."""

    tiling: Tiling
    spans: list[Span]
    query_slots: Tensor
    """[n_tiles * tile_len] row in each slot as a query, -1 if empty or a key only."""
    key_slots: Tensor
    """[n_tiles * tile_len] likewise, as a key."""
    home: Tensor
    """[n_rows] slot of each row as a query; a slot of the last tile if it is none in this round."""
    key_slot_of_row: Tensor | None
    """[n_rows] slot of each row as a key, likewise; None where a key may stand in several (wrapped chunks)."""
    edges: Edges | None
    """Window rule."""

    def gather_indices(self) -> tuple[Tensor, Tensor]:
        """The slots of queries and keys, with some row where they are empty."""
        queries = self.query_slots.clamp_min(0)
        return queries, queries if self.key_slots is self.query_slots else self.key_slots.clamp_min(0)

    @property
    def n_tiles(self) -> int:
        return self.query_slots.numel() // self.tiling.tile_len


@dataclass(frozen=True)
class Edges:
    """Window rule: which tiles look beyond the ends of their bucket, and where those ends are."""

    within_reach: npt.NDArray[np.bool_]
    """[n_tiles] on the host."""
    rank: Tensor
    """[n_tiles] rank in its bucket of each tile's first slot."""
    count: Tensor
    """[n_tiles] tokens of each tile's bucket over all ranks; 0 where a tile is empty."""


def build_layouts(
    keys: list[Tensor], total: Tensor, seq_len: int, options: AttentionOptions, part: Partition
) -> list[Layout]:
    """The layouts of all rounds of the rows that a part holds of an order of seq_len tokens.

    keys: of each round, see `order.row_sort_keys`; total [BH, R, K]: members of each bucket over all parts.
    """
    rule, n_buckets = options.rule, options.n_buckets
    tiling = choose_tiling(rule, seq_len, n_buckets)
    if isinstance(rule, ChunkRule):
        run = chunk_partition(seq_len, rule, part)
        return chunk_layouts(torch.stack(keys), total.shape[0], n_buckets, rule, run, tiling)
    runs = [window_partition(total[:, r], rule, tiling.tile_len, part) for r in range(len(keys))]
    return [window_layout(key, run, tiling) for key, run in zip(keys, runs, strict=True)]


def window_layout(keys: Tensor, run: WindowPartition, tiling: Tiling) -> Layout:
    """The layout of rows with sort keys [n_rows] (see `order.row_sort_keys`), of which `run` says what they are.

    The order is made on the host, where small integers are sorted fast and the number of tiles must be known.
    """
    sort_keys, start, total = (x.flatten().cpu().numpy() for x in (keys, run.start, run.total))
    tile_len = tiling.tile_len
    counts = np.bincount(sort_keys, minlength=total.size + 1)[:-1]
    n_present = int(counts.sum())
    order = radix_argsort(sort_keys)[:n_present]

    skipped = start // tile_len  # tiles of the bucket that other ranks hold
    tiles = np.where(counts > 0, -(-(start + counts) // tile_len) - skipped, 0)
    first_tile = np.cumsum(tiles) - tiles
    placement = place_tiles(tiles, start == 0, tiling, _span_tiles(tiling, keys))
    rank = np.arange(n_present) + np.repeat(start - (np.cumsum(counts) - counts), counts)
    tile = placement.number[np.repeat(first_tile - skipped, counts) + rank // tile_len]
    slot = tile * tile_len + rank % tile_len

    n_slots = placement.n_tiles * tile_len
    keys_in, home = np.full(n_slots, -1), np.full(sort_keys.size, n_slots - 1)
    keys_in[slot], home[order] = order, slot
    queries, queries_home = keys_in, home
    if run.query_start is not run.start or run.query_stop is not run.total:
        query_start, query_stop = (x.flatten().cpu().numpy() for x in (run.query_start, run.query_stop))
        is_query = (rank >= np.repeat(query_start, counts)) & (rank < np.repeat(query_stop, counts))
        queries, queries_home = np.full_like(keys_in, -1), np.full_like(home, n_slots - 1)
        queries[slot[is_query]], queries_home[order[is_query]] = order[is_query], slot[is_query]

    of_tile = np.repeat(np.arange(tiles.size), tiles)
    tile_rank, tile_count = np.zeros((2, placement.n_tiles), dtype=np.int64)
    tile_rank[placement.number] = (np.arange(of_tile.size) - (first_tile - skipped)[of_tile]) * tile_len
    tile_count[placement.number] = total[of_tile]
    behind = tile_count - tile_rank - tile_len
    within_reach = (tile_rank < tiling.n_before * tile_len) | (behind < tiling.n_after * tile_len)
    within_reach[: placement.first_deep] = False  # shallow tiles look at nothing but their bucket

    def on_device(x: Integers) -> Tensor:
        return torch.from_numpy(x).to(keys.device)

    key_slots, key_slot_of_row = on_device(keys_in), on_device(home)
    is_whole = queries is keys_in
    query_slots, query_home = (key_slots, key_slot_of_row) if is_whole else (on_device(queries), on_device(queries_home))
    edges = Edges(within_reach, on_device(tile_rank), on_device(tile_count))
    return Layout(tiling, placement.spans, query_slots, key_slots, query_home, key_slot_of_row, edges)


def _span_tiles(tiling: Tiling, on: Tensor) -> int:
    return max(1, SPAN_SLOTS["cuda" if on.is_cuda else "cpu"] // tiling.tile_len)


def chunk_layouts(
    keys: Tensor, n_units: int, n_buckets: int, rule: ChunkRule, run: ChunkPartition, tiling: Tiling
) -> list[Layout]:
    """The layouts of all rounds of rows with sort keys [R, n_rows]."""
    n_rounds = keys.shape[0]
    chunks = torch.stack([_needed_chunks(keys[r], n_units, n_buckets, rule, run) for r in range(n_rounds)], dim=1)
    return [_chunk_layout(chunks, r, keys.shape[1], rule, run, tiling) for r in range(n_rounds)]


def _needed_chunks(keys: Tensor, n_units: int, n_buckets: int, rule: ChunkRule, run: ChunkPartition) -> Tensor:
    """Rows of the chunks that this rank needs of one round, [BH, n_needed, chunk_len], -1 where empty.

    The needed chunks of a unit are full but for the last that has any tokens: its rows fill them in order.
    """
    sort_keys = keys.cpu().numpy()
    counts = np.bincount(sort_keys // n_buckets, minlength=n_units + 1)[:n_units]
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    chunks = np.full((n_units, len(run.needed) * rule.chunk_len), -1)
    chunks[np.repeat(np.arange(n_units), counts), place] = radix_argsort(sort_keys)[: place.size]
    return torch.from_numpy(chunks).to(keys.device).view(n_units, len(run.needed), rule.chunk_len)


def _chunk_layout(
    chunks: Tensor, round_: int, n_rows: int, rule: ChunkRule, run: ChunkPartition, tiling: Tiling
) -> Layout:
    """chunks [BH, R, n_needed, chunk_len]: rows, -1 where empty."""
    n_units, n_rounds, n_needed, _ = chunks.shape
    nobody = chunks.new_full((n_units, 1, rule.chunk_len), -1)
    every = torch.cat([chunks.flatten(1, 2), nobody], dim=1)
    number = {c: i for i, c in enumerate(run.needed)}

    def block(chunk: int, *, as_query: bool) -> int:
        """Where in `every` the chunk of this round is found, be it before the first or behind the last."""
        if as_query:
            return round_ * n_needed + number[chunk] if run.start <= chunk < run.stop else n_rounds * n_needed
        if not rule.wrap and not 0 <= chunk < run.n_chunks:
            return n_rounds * n_needed
        whole = (round_ * run.n_chunks + chunk) % (n_rounds * run.n_chunks)
        return whole // run.n_chunks * n_needed + number[whole % run.n_chunks]

    # a unit's tiles: `n_before` that only lend keys, its chunks, `n_after` that only lend keys
    local = range(run.start - rule.n_before, run.stop + rule.n_after) if run.stop > run.start else range(0)
    before, after = (chunks.new_full((n * rule.chunk_len,), -1) for n in (tiling.n_before, max(1, tiling.n_after)))
    query_slots, key_slots = (
        torch.cat([before, every[:, [block(chunk, as_query=as_query) for chunk in local]].flatten(), after])
        for as_query in (True, False)
    )
    home = _homes(query_slots, n_rows)
    key_slot_of_row = None if rule.wrap else _homes(key_slots, n_rows)
    spans = consecutive_spans(tiling.n_before, tiling.n_before + n_units * len(local), tiling, _span_tiles(tiling, chunks))
    return Layout(tiling, spans, query_slots, key_slots, home, key_slot_of_row, None)


def _homes(slots: Tensor, n_rows: int) -> Tensor:
    """Slot of each row, the last one (which is empty) for rows that stand in none."""
    home = torch.full((n_rows,), slots.numel() - 1, device=slots.device)
    taken = (slots >= 0).nonzero().squeeze(1)
    home[slots[taken]] = taken
    return home
