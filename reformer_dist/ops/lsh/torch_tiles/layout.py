"""Layout of one round: rows sorted by (bucket, position) and padded into tiles.

A *slot* is a position in the padded order. It holds a row (a token of some head) or is empty (-1). A *tile* is
`tile_len` slots; `tiles` chooses the order of the tiles.

Window rule: every bucket starts on a tile border. So the column in which a query finds a key depends on their
ranks within the bucket alone, not on the sizes of other buckets, and sums run in the same order for any future
tokens: strictly causal to the last bit. Chunk rule: a tile is a chunk, and empty tiles (or the wrapped ones)
separate the heads.

Rows of several heads are laid out together, in any order that keeps the tokens of a head sorted by position. A row
may be absent from a round (padding, or a token that this rank does not need there), or be a key only. The last
tile is always empty: rows that are not queries in a round point to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reformer_dist.ops.lsh.neighbour_rules import ChunkRule, WindowRule
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.partition import (
    ChunkPartition,
    Partition,
    Tiling,
    WindowPartition,
    choose_tiling,
    chunk_partition,
    window_partition,
)
from reformer_dist.ops.lsh.sorting import radix_argsort
from reformer_dist.ops.lsh.torch_tiles.tiles import (
    SPAN_SLOTS,
    Integers,
    Span,
    column_offsets,
    consecutive_spans,
    place_tiles,
    spans_of_own_keys,
)


@dataclass(frozen=True)
class Layout:
    """One round of a group of heads."""

    tiling: Tiling
    spans: list[Span]
    query_slots: Tensor
    """[n_tiles * tile_len] row in each slot as a query; -1 if empty or a key only."""
    key_slots: Tensor
    """[n_tiles * tile_len] row in each slot as a key."""
    slot_of_row: Tensor
    """[n_rows] slot of each row as a query; a slot of the last tile if it is not a query in this round."""
    key_slot_of_row: Tensor | None
    """[n_rows] slot of each row as a key, likewise; None if one may have several (wrapped chunks, own keys)."""
    edges: Edges | None
    """Window rule only."""
    query_ranks: Tensor | None = None
    """[slots of queries] with keys of their own: rank within its bucket of the last key up to the query."""

    def gather_indices(self) -> tuple[Tensor, Tensor]:
        """Rows in the slots of queries and of keys, with row 0 in empty slots."""
        queries = self.query_slots.clamp_min(0)
        return queries, queries if self.key_slots is self.query_slots else self.key_slots.clamp_min(0)

    @property
    def n_tiles(self) -> int:
        """Tiles of queries."""
        return self.query_slots.numel() // self.tiling.tile_len


@dataclass(frozen=True)
class Edges:
    """Window rule: the tiles that reach beyond the ends of their bucket, and those ends."""

    is_edge: npt.NDArray[np.bool_]
    """[n_tiles] on the host."""
    rank: Tensor
    """[n_tiles] rank within the bucket of each tile's first slot."""
    count: Tensor
    """[n_tiles] size of each tile's bucket over all ranks; 0 if the tile is empty."""


def build_layouts(
    keys: list[Tensor],
    total: Tensor,
    seq_len: int,
    options: AttentionOptions,
    partition: Partition,
    queries: list[Tensor] | None = None,
) -> list[Layout]:
    """Layouts of all rounds of the rows of a partition; the whole order has seq_len tokens per head.

    keys: sort keys of each round, see `sorting.row_sort_keys`; total [BH, R, K]: bucket sizes over all partitions.
    queries: sort keys of the rows as queries, if they differ; then those that another rank attends are absent.
    """
    rule, n_buckets = options.rule, options.n_buckets
    tiling = choose_tiling(rule, seq_len, n_buckets)
    if isinstance(rule, ChunkRule):
        chunks = chunk_partition(seq_len, rule, partition)
        return chunk_layouts(torch.stack(keys), total.shape[0], n_buckets, rule, chunks, tiling)
    parts = [window_partition(total[:, r], rule, tiling.tile_len, partition) for r in range(len(keys))]
    if queries is not None:
        rounds = zip(queries, keys, parts, strict=True)
        return [own_keys_layout(query, key, part, rule, tiling) for query, key, part in rounds]
    return [window_layout(key, part, tiling) for key, part in zip(keys, parts, strict=True)]


def window_layout(keys: Tensor, part: WindowPartition, tiling: Tiling) -> Layout:
    """Layout of rows with sort keys [n_rows] (see `sorting.row_sort_keys`): the members of the buckets in `part`.

    Sorts on the host, where small integers sort fast and the number of tiles must be known.
    """
    sort_keys, start, total = (x.flatten().cpu().numpy() for x in (keys, part.start, part.total))
    tile_len = tiling.tile_len
    counts = np.bincount(sort_keys, minlength=total.size + 1)[:-1]
    n_present = int(counts.sum())
    order = radix_argsort(sort_keys)[:n_present]

    skipped = start // tile_len  # tiles of the bucket on earlier ranks
    tiles = np.where(counts > 0, -(-(start + counts) // tile_len) - skipped, 0)
    first_tile = np.cumsum(tiles) - tiles
    placement = place_tiles(tiles, start == 0, tiling, _span_tiles(tiling, keys))
    rank = np.arange(n_present) + np.repeat(start - (np.cumsum(counts) - counts), counts)
    tile = placement.tile_index[np.repeat(first_tile - skipped, counts) + rank // tile_len]
    slot = tile * tile_len + rank % tile_len

    n_slots = placement.n_tiles * tile_len
    key_rows, key_slot = np.full(n_slots, -1), np.full(sort_keys.size, n_slots - 1)
    key_rows[slot], key_slot[order] = order, slot
    query_rows, query_slot = key_rows, key_slot
    if part.query_start is not part.start or part.query_stop is not part.total:
        query_start, query_stop = (x.flatten().cpu().numpy() for x in (part.query_start, part.query_stop))
        is_query = (rank >= np.repeat(query_start, counts)) & (rank < np.repeat(query_stop, counts))
        query_rows, query_slot = np.full_like(key_rows, -1), np.full_like(key_slot, n_slots - 1)
        query_rows[slot[is_query]], query_slot[order[is_query]] = order[is_query], slot[is_query]

    bucket_of_tile = np.repeat(np.arange(tiles.size), tiles)
    tile_rank, tile_count = np.zeros((2, placement.n_tiles), dtype=np.int64)
    rank_in_bucket = np.arange(bucket_of_tile.size) - (first_tile - skipped)[bucket_of_tile]
    tile_rank[placement.tile_index] = rank_in_bucket * tile_len
    tile_count[placement.tile_index] = total[bucket_of_tile]
    n_following = tile_count - tile_rank - tile_len
    is_edge = (tile_rank < tiling.n_before * tile_len) | (n_following < tiling.n_after * tile_len)
    is_edge[: placement.first_deep] = False  # shallow tiles are paired within their bucket only

    def on_device(x: Integers) -> Tensor:
        return torch.from_numpy(x).to(keys.device)

    keys_on_device = on_device(key_rows), on_device(key_slot)
    all_are_queries = query_rows is key_rows
    queries_on_device = keys_on_device if all_are_queries else (on_device(query_rows), on_device(query_slot))
    (key_slots, key_slot_of_row), (query_slots, slot_of_row) = keys_on_device, queries_on_device
    edges = Edges(is_edge, on_device(tile_rank), on_device(tile_count))
    return Layout(tiling, placement.spans, query_slots, key_slots, slot_of_row, key_slot_of_row, edges)


def own_keys_layout(
    queries: Tensor, keys: Tensor, part: WindowPartition, rule: WindowRule, tiling: Tiling
) -> Layout:
    """Layout of rows with sort keys [n_rows] as queries and as keys.

    The last key up to a query determines its *home*, a tile of keys of its bucket. Queries of one home fill tiles
    of their own, and each of these has copies of the tiles of keys around its home.
    """
    query_keys, sort_keys, start, total = (
        x.flatten().cpu().numpy() for x in (queries, keys, part.start, part.total)
    )
    tile_len, n_rows = tiling.tile_len, sort_keys.size
    counts = np.bincount(sort_keys, minlength=total.size + 1)[:-1]
    key_order = radix_argsort(sort_keys)[: int(counts.sum())]
    first_key = np.cumsum(counts) - counts

    order = radix_argsort(query_keys)[: np.count_nonzero(query_keys < total.size)]
    bucket = query_keys[order]
    # rows of a head are sorted by position
    by_position = np.searchsorted(
        sort_keys[key_order] * n_rows + key_order, bucket * n_rows + order, "right" if rule.sees_self else "left"
    )
    last_key = by_position - first_key[bucket] - 1 + start[bucket]
    meets_keys = last_key >= 0 if rule.causal else total[bucket] > 0
    order, bucket, last_key = order[meets_keys], bucket[meets_keys], last_key[meets_keys]

    home = np.maximum(last_key, 0) // tile_len
    is_first = np.ones(order.size, dtype=np.bool_)
    is_first[1:] = (np.diff(bucket) != 0) | (np.diff(home) != 0)
    first = np.flatnonzero(is_first)
    sizes = np.diff(np.append(first, order.size))
    tiles = -(-sizes // tile_len)
    slot = np.arange(order.size) + np.repeat((np.cumsum(tiles) - tiles) * tile_len - first, sizes)
    n_tiles = int(tiles.sum())
    query_rows, query_ranks = np.full((2, (n_tiles + 1) * tile_len), -1)
    query_slot = np.full(n_rows, query_rows.size - 1)
    query_rows[slot], query_ranks[slot], query_slot[order] = order, last_key, slot

    tile_bucket, tile_home = (np.repeat(x[first], tiles) for x in (bucket, home))
    offset = np.array(column_offsets(tiling))
    rank = (tile_home[:, None] - offset)[:, :, None] * tile_len + np.arange(tile_len)
    rank = rank.reshape(n_tiles, offset.size * tile_len)
    held = rank - start[tile_bucket, None]
    is_held = (held >= 0) & (held < counts[tile_bucket, None])
    key_rows = np.full((n_tiles * offset.size + 1) * tile_len, -1)  # with an empty tile at the end
    key_rows[:-tile_len][is_held.ravel()] = key_order[(first_key[tile_bucket, None] + held)[is_held]]

    def on_device(x: Integers) -> Tensor:
        return torch.from_numpy(x).to(keys.device)

    edges = Edges(np.ones(n_tiles, dtype=np.bool_), on_device(tile_home * tile_len), on_device(total[tile_bucket]))
    spans = spans_of_own_keys(n_tiles, tiling, _span_tiles(tiling, keys))
    query_slots, key_slots, slot_of_row, ranks = map(on_device, (query_rows, key_rows, query_slot, query_ranks))
    return Layout(tiling, spans, query_slots, key_slots, slot_of_row, None, edges, ranks)


def _span_tiles(tiling: Tiling, x: Tensor) -> int:
    """Tiles per span on the device of x."""
    return max(1, SPAN_SLOTS["cuda" if x.is_cuda else "cpu"] // tiling.tile_len)


def chunk_layouts(
    keys: Tensor, n_heads: int, n_buckets: int, rule: ChunkRule, part: ChunkPartition, tiling: Tiling
) -> list[Layout]:
    """Layouts of all rounds of rows with sort keys [R, n_rows]."""
    n_rounds = keys.shape[0]
    chunks = torch.stack([_needed_chunks(keys[r], n_heads, n_buckets, rule, part) for r in range(n_rounds)], dim=1)
    return [_chunk_layout(chunks, r, keys.shape[1], rule, part, tiling) for r in range(n_rounds)]


def _needed_chunks(keys: Tensor, n_heads: int, n_buckets: int, rule: ChunkRule, part: ChunkPartition) -> Tensor:
    """Rows of the chunks that this rank needs in one round, [BH, n_needed, chunk_len], -1 if empty.

    The needed chunks of a head are full except the last that has any tokens, so its rows fill them in order.
    """
    sort_keys = keys.cpu().numpy()
    counts = np.bincount(sort_keys // n_buckets, minlength=n_heads + 1)[:n_heads]
    slot = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    chunks = np.full((n_heads, len(part.needed) * rule.chunk_len), -1)
    chunks[np.repeat(np.arange(n_heads), counts), slot] = radix_argsort(sort_keys)[: slot.size]
    return torch.from_numpy(chunks).to(keys.device).view(n_heads, len(part.needed), rule.chunk_len)


def _chunk_layout(
    chunks: Tensor, round_: int, n_rows: int, rule: ChunkRule, part: ChunkPartition, tiling: Tiling
) -> Layout:
    """Layout of one round. chunks [BH, R, n_needed, chunk_len]: rows, -1 if empty."""
    n_heads, n_rounds, n_needed, _ = chunks.shape
    empty = chunks.new_full((n_heads, 1, rule.chunk_len), -1)
    all_chunks = torch.cat([chunks.flatten(1, 2), empty], dim=1)
    needed_index = {c: i for i, c in enumerate(part.needed)}

    def chunk_index(chunk: int, *, as_query: bool) -> int:
        """Index in `all_chunks` of a chunk of this round, which may be before the first or after the last."""
        empty_index = n_rounds * n_needed
        if as_query:
            return round_ * n_needed + needed_index[chunk] if part.start <= chunk < part.stop else empty_index
        if not rule.wrap and not 0 <= chunk < part.n_chunks:
            return empty_index
        wrapped = (round_ * part.n_chunks + chunk) % (n_rounds * part.n_chunks)
        return wrapped // part.n_chunks * n_needed + needed_index[wrapped % part.n_chunks]

    # the tiles of a head: `n_before` of keys only, its chunks, `n_after` of keys only
    local = range(part.start - rule.n_before, part.stop + rule.n_after) if part.stop > part.start else range(0)
    before, after = (chunks.new_full((n * rule.chunk_len,), -1) for n in (tiling.n_before, max(1, tiling.n_after)))
    query_slots, key_slots = (
        torch.cat([before, all_chunks[:, [chunk_index(c, as_query=as_query) for c in local]].flatten(), after])
        for as_query in (True, False)
    )
    slot_of_row = _slot_of_row(query_slots, n_rows)
    key_slot_of_row = None if rule.wrap else _slot_of_row(key_slots, n_rows)
    spans = consecutive_spans(
        tiling.n_before, tiling.n_before + n_heads * len(local), tiling, _span_tiles(tiling, chunks)
    )
    return Layout(tiling, spans, query_slots, key_slots, slot_of_row, key_slot_of_row, None)


def _slot_of_row(slots: Tensor, n_rows: int) -> Tensor:
    """Slot of each row; the last slot (which is empty) for rows in none."""
    slot_of_row = torch.full((n_rows,), slots.numel() - 1, dtype=torch.int64, device=slots.device)
    taken = (slots >= 0).nonzero().squeeze(1)
    slot_of_row[slots[taken]] = taken
    return slot_of_row
