"""One round's order by (bucket, position), laid out in tiles that attention can take as they are.

A *slot* is a place in the laid-out order; it holds a row (a token of some unit) or is empty (-1). A *tile* is
`tile_len` slots. The queries of a tile look at the slots from `back` before the tile to `front` behind it.

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

import torch
from torch import Tensor

from reformer_dist.ops.lsh.rules import AttentionOptions, ChunkRule
from reformer_dist.ops.lsh.runs import ChunkRun, Part, Tiling, WindowRun, chunk_run, tiling_of, window_run


@dataclass(frozen=True)
class Layout:
    """One round of a group of units."""

    tiling: Tiling
    query_slots: Tensor
    """[n_tiles * tile_len] row in each slot as a query, -1 if empty or a key only."""
    key_slots: Tensor
    """[back + n_tiles * tile_len + front] likewise, as a key."""
    home: Tensor
    """[n_rows] slot of each row as a query; a slot of the last tile if it is none in this round."""
    key_home: Tensor | None
    """[n_rows] slot of each row as a key, likewise; None where a key may stand in several (wrapped chunks)."""
    rank: Tensor | None
    """Window rule: [n_tiles] rank in its bucket of each tile's first slot."""
    count: Tensor | None
    """Window rule: [n_tiles] tokens of each tile's bucket over all ranks; 0 in the last tile."""

    @property
    def n_tiles(self) -> int:
        return self.query_slots.numel() // self.tiling.tile_len


def row_keys(unit: Tensor, bucket: Tensor, n_units: int, n_buckets: int) -> Tensor:
    """What rows are sorted by, int64 [n_rows]: (unit, bucket); absent rows (bucket = n_buckets) come last."""
    key = unit * n_buckets + bucket.long()
    return key.masked_fill_(bucket == n_buckets, n_units * n_buckets)


def lay_out_rows(
    keys: list[Tensor], total: Tensor, seq_len: int, options: AttentionOptions, part: Part
) -> list[Layout]:
    """The layouts of all rounds of the rows that a part holds of an order of seq_len tokens.

    keys: of each round, see `row_keys`; total [U, R, K]: members of each bucket over all parts.
    """
    rule, n_buckets = options.rule, options.n_buckets
    tiling = tiling_of(rule, seq_len, n_buckets)
    if isinstance(rule, ChunkRule):
        run = chunk_run(seq_len, rule, part)
        return chunk_layouts(torch.stack(keys), total.shape[0], n_buckets, rule, run, tiling)
    runs = [window_run(total[:, r], rule, tiling.tile_len, part) for r in range(len(keys))]
    return [window_layout(key, run, tiling) for key, run in zip(keys, runs, strict=True)]


def window_layout(keys: Tensor, run: WindowRun, tiling: Tiling) -> Layout:
    """The layout of rows with sort keys [n_rows] (see `row_keys`), of which `run` says what they are."""
    start, total = run.start.flatten(), run.total.flatten()
    tile_len, device = tiling.tile_len, keys.device
    sorted_keys, order = torch.sort(keys, stable=True)
    counts = torch.bincount(sorted_keys, minlength=total.numel() + 1)[:-1]
    n_present = int(counts.sum())
    order, sorted_keys = order[:n_present], sorted_keys[:n_present]

    skipped = start // tile_len  # tiles of the bucket that other ranks hold
    tiles = torch.where(counts > 0, (start + counts + tile_len - 1) // tile_len - skipped, 0)
    first_tile = tiles.cumsum(0) - tiles
    bucket_of_tile = torch.repeat_interleave(tiles)
    n_slots = (bucket_of_tile.numel() + 1) * tile_len
    rank = torch.arange(n_present, device=device) + (start - (counts.cumsum(0) - counts))[sorted_keys]
    slot = ((first_tile - skipped) * tile_len)[sorted_keys] + rank

    slots = torch.full((tiling.back + n_slots + tiling.front,), -1, device=device)
    keys_in = slots[tiling.back : tiling.back + n_slots]
    keys_in[slot] = order
    home = torch.full((keys.numel(),), n_slots - 1, device=device)
    home[order] = slot
    query_slots, query_home = keys_in, home
    if run.query_start is not run.start or run.query_stop is not run.total:
        is_query = (rank >= run.query_start.flatten()[sorted_keys]) & (
            rank < run.query_stop.flatten()[sorted_keys]
        )
        query_slots, query_home = torch.full_like(keys_in, -1), torch.full_like(home, n_slots - 1)
        query_slots[slot[is_query]] = order[is_query]
        query_home[order[is_query]] = slot[is_query]
    tile = torch.arange(bucket_of_tile.numel(), device=device)
    first_rank = (tile - (first_tile - skipped)[bucket_of_tile]) * tile_len
    at_end = torch.nn.functional.pad
    return Layout(
        tiling,
        query_slots,
        slots,
        query_home,
        home,
        at_end(first_rank, (0, 1)),
        at_end(total[bucket_of_tile], (0, 1)),
    )


def chunk_layouts(
    keys: Tensor, n_units: int, n_buckets: int, rule: ChunkRule, run: ChunkRun, tiling: Tiling
) -> list[Layout]:
    """The layouts of all rounds of rows with sort keys [R, n_rows]."""
    n_rounds = keys.shape[0]
    chunks = torch.stack([_needed_chunks(keys[r], n_units, n_buckets, rule, run) for r in range(n_rounds)], dim=1)
    return [_chunk_layout(chunks, r, keys.shape[1], rule, run, tiling) for r in range(n_rounds)]


def _needed_chunks(keys: Tensor, n_units: int, n_buckets: int, rule: ChunkRule, run: ChunkRun) -> Tensor:
    """Rows of the chunks that this rank needs of one round, [U, n_needed, chunk_len], -1 where empty.

    The needed chunks of a unit are full but for the last that has any tokens: its rows fill them in order.
    """
    sorted_keys, order = torch.sort(keys, stable=True)
    counts = torch.bincount(sorted_keys // n_buckets, minlength=n_units + 1)[:n_units]
    n_present = int(counts.sum())
    unit = torch.repeat_interleave(counts)
    place = torch.arange(n_present, device=keys.device) - (counts.cumsum(0) - counts)[unit]
    chunks = torch.full((n_units, len(run.needed) * rule.chunk_len), -1, device=keys.device)
    chunks[unit, place] = order[:n_present]
    return chunks.view(n_units, len(run.needed), rule.chunk_len)


def _chunk_layout(
    chunks: Tensor, round_: int, n_rows: int, rule: ChunkRule, run: ChunkRun, tiling: Tiling
) -> Layout:
    """chunks [U, R, n_needed, chunk_len]: rows, -1 where empty."""
    n_units, n_rounds, n_needed, _ = chunks.shape
    before, after = tiling.back, tiling.front
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
    queries, keys = (
        every[:, [block(chunk, as_query=as_query) for chunk in local]].flatten() for as_query in (True, False)
    )
    empty = chunks.new_full((max(before, after) + rule.chunk_len,), -1)
    query_slots = torch.cat([queries, empty[: rule.chunk_len]])
    key_slots = torch.cat([empty[:before], keys, empty[: rule.chunk_len + after]])
    home = _homes(query_slots, n_rows)
    key_home = None if rule.wrap else _homes(key_slots[before : before + query_slots.numel()], n_rows)
    return Layout(tiling, query_slots, key_slots, home, key_home, None, None)


def _homes(slots: Tensor, n_rows: int) -> Tensor:
    """Slot of each row, the last one (which is empty) for rows that stand in none."""
    home = torch.full((n_rows,), slots.numel() - 1, device=slots.device)
    taken = (slots >= 0).nonzero().squeeze(1)
    home[slots[taken]] = taken
    return home
