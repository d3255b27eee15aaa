"""The order and the table of tiles from sorted bucket ids, in one pass and without sums over buckets.

A tile that begins at slot s of the order, in bucket b, is entry s // block + b of the table. No two tiles share an
entry, since the tiles of a bucket begin a block apart and later buckets have later slots.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

SLOTS = 256  # of a program


@triton.jit
def _build_table(
    ids_ptr, rows_ptr, bounds_ptr, order_ptr, table_ptr, seq_len, n_entries, n_first, padding, n_halvings,
    SORTED: tl.constexpr, CHUNKED: tl.constexpr, SHARDED: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """ids, rows, order [BH * R, S]; table [BH * R, n_entries, 4 or 6], whose zeros are empty entries."""
    COLUMNS: tl.constexpr = 6 if SHARDED else 4
    line = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    is_slot = slot < seq_len
    if SORTED:
        ids_ptr += line * seq_len
        row = tl.load(rows_ptr + line * seq_len + slot, mask=is_slot, other=0).to(tl.int32)
        id_ = tl.load(ids_ptr + slot, mask=is_slot, other=0).to(tl.int32)
        previous = tl.load(ids_ptr + slot - 1, mask=is_slot & (slot > 0), other=0).to(tl.int32)
        is_first = is_slot & ((id_ != previous) | (slot == 0))
        if CHUNKED:
            is_first = is_slot & (((id_ == padding) & (previous != padding)) | (slot == 0))
        end = _bucket_end(ids_ptr, slot, id_, is_first, seq_len, padding, n_halvings, CHUNKED)
        key_end = tl.where(id_ == padding, slot, end)
        bucket = id_
        if CHUNKED:
            bucket = (id_ == padding).to(tl.int32)
        begin, n_tiles = slot, tl.where(is_first, tl.cdiv(end - slot, BLOCK), 0)
    else:  # one bucket: whether a tile begins at a slot follows from the slot alone
        row, bucket, begin = slot, slot * 0, slot * 0
        end, key_end = begin + seq_len, begin + seq_len
        n_tiles = (is_slot & (slot % BLOCK == 0)).to(tl.int32)
    if SHARDED:
        is_bucket = is_first & (id_ != padding)
        n_tiles = tl.where(is_bucket, n_tiles, 0)
        bounds_ptr += (line * padding + id_) * 2
        query_begin = slot + tl.load(bounds_ptr, mask=is_bucket, other=0)
        query_end = slot + tl.load(bounds_ptr + 1, mask=is_bucket, other=0)
    tl.store(order_ptr + line * seq_len + slot, row, mask=is_slot)
    table_ptr += line * n_entries * COLUMNS
    if TAIL:
        _store_entry(table_ptr + bucket * COLUMNS, slot, begin, key_end, end, is_first)
        n_tiles = tl.where(is_first, tl.cdiv(tl.maximum(end - slot - BLOCK, 0), TAIL), 0)
        # in any order: which entry a tile has does not matter
        n_before = tl.atomic_add(table_ptr + n_first * COLUMNS, tl.sum(n_tiles, 0))
        listed = n_first + 1 + n_before + tl.cumsum(n_tiles, 0) - n_tiles
    for tile in range(tl.max(n_tiles, 0)):
        is_tile = tile < n_tiles
        if TAIL:
            first, entry = slot + BLOCK + tile * TAIL, listed + tile
        else:
            first = slot + tile * BLOCK
            entry = first // BLOCK + bucket
        entry_ptr = table_ptr + entry * COLUMNS
        _store_entry(entry_ptr, first, begin, key_end, end, is_tile)
        if SHARDED:
            tl.store(entry_ptr + 4, query_begin, mask=is_tile)
            tl.store(entry_ptr + 5, query_end, mask=is_tile)


@triton.jit
def _store_entry(entry_ptr, first, begin, key_end, end, is_tile):
    tl.store(entry_ptr, first, mask=is_tile)
    tl.store(entry_ptr + 1, begin, mask=is_tile)
    tl.store(entry_ptr + 2, key_end, mask=is_tile)
    tl.store(entry_ptr + 3, end, mask=is_tile)


@triton.jit
def _bucket_end(ids_ptr, slot, id_, is_first, seq_len, padding, n_halvings, CHUNKED: tl.constexpr):
    """The slot after the bucket that begins at each first slot, by binary search."""
    low, high = slot + 1, slot * 0 + seq_len
    for _ in range(n_halvings):
        is_open = is_first & (low < high)
        middle = (low + high) // 2
        later = tl.load(ids_ptr + middle, mask=is_open, other=0).to(tl.int32)
        is_after = later != id_
        if CHUNKED:
            is_after = (later == padding) & (id_ != padding)
        high = tl.where(is_open & is_after, middle, high)
        low = tl.where(is_open & ~is_after, middle + 1, low)
    return high


def build_table(
    sorted_ids: Tensor,
    rows: Tensor | None,
    query_bounds: Tensor | None,
    order: Tensor,
    table: Tensor,
    n_buckets: int,
    block: int,
    *,
    chunked: bool,
    n_first: int = 0,
    tail_block: int = 0,
) -> None:
    """Fills order [BH, R, S] and table [BH, R, entries, 4] from sorted ids and their rows [BH, R, S].

    The id n_buckets marks padding. Without rows there is one bucket, in the order of the rows. With query_bounds
    (`Shard.query_bounds`) the table has 6 columns. With a tail_block, it has n_first entries of the first tiles of
    buckets, one that begins with the number of tiles in the list after it, and that list, see `Tiles.n_first`.
    """
    n_heads, n_rounds, seq_len = order.shape
    _build_table[(triton.cdiv(seq_len, SLOTS), n_heads * n_rounds)](
        sorted_ids, sorted_ids if rows is None else rows, order if query_bounds is None else query_bounds,
        order, table, seq_len, table.shape[2], n_first, n_buckets, seq_len.bit_length(),
        SORTED=rows is not None,
        CHUNKED=chunked,
        SHARDED=query_bounds is not None,
        BLOCK=block,
        TAIL=tail_block,
        SLOTS=SLOTS,
    )  # fmt: skip
