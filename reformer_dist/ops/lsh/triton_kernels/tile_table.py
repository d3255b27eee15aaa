"""From sorted bucket ids to the order as rows and the table of tiles, in one pass and without sums over buckets.

A tile that begins at a place of a bucket lies in slot place // block + bucket of the table: no two tiles share
one, since tiles of a bucket begin a block apart and later buckets have later places.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PLACES = 256


@triton.jit
def _build_table(
    ids_ptr, places_ptr, bounds_ptr, order_ptr, table_ptr, seq_len, n_slots, padding, n_halvings,
    SORTED: tl.constexpr, CHUNKED: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """ids, places, order [unit and round, S]; table [unit and round, n_slots, 4 or 6], zeros where no tile is."""
    COLUMNS: tl.constexpr = 6 if HELD else 4
    line = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    is_place = place < seq_len
    if SORTED:
        ids_ptr += line * seq_len
        row = tl.load(places_ptr + line * seq_len + place, mask=is_place, other=0).to(tl.int32)
        own = tl.load(ids_ptr + place, mask=is_place, other=0).to(tl.int32)
        before = tl.load(ids_ptr + place - 1, mask=is_place & (place > 0), other=0).to(tl.int32)
        is_first = is_place & ((own != before) | (place == 0))
        if CHUNKED:
            is_first = is_place & (((own == padding) & (before != padding)) | (place == 0))
        end = _end(ids_ptr, place, own, is_first, seq_len, padding, n_halvings, CHUNKED)
        key_end = tl.where(own == padding, place, end)
        bucket = own
        if CHUNKED:
            bucket = (own == padding).to(tl.int32)
        begin, n_tiles = place, tl.where(is_first, tl.cdiv(end - place, BLOCK), 0)
    else:  # one bucket: each place knows by itself whether a tile begins there
        row, bucket, begin = place, place * 0, place * 0
        end, key_end = begin + seq_len, begin + seq_len
        n_tiles = (is_place & (place % BLOCK == 0)).to(tl.int32)
    if HELD:
        is_bucket = is_first & (own != padding)
        n_tiles = tl.where(is_bucket, n_tiles, 0)
        bounds_ptr += (line * padding + own) * 2
        query_begin = place + tl.load(bounds_ptr, mask=is_bucket, other=0)
        query_end = place + tl.load(bounds_ptr + 1, mask=is_bucket, other=0)
    tl.store(order_ptr + line * seq_len + place, row, mask=is_place)
    for tile in range(tl.max(n_tiles, 0)):
        first = place + tile * BLOCK
        slot_ptr = table_ptr + (line * n_slots + first // BLOCK + bucket) * COLUMNS
        is_tile = tile < n_tiles
        tl.store(slot_ptr, first, mask=is_tile)
        tl.store(slot_ptr + 1, begin, mask=is_tile)
        tl.store(slot_ptr + 2, key_end, mask=is_tile)
        tl.store(slot_ptr + 3, end, mask=is_tile)
        if HELD:
            tl.store(slot_ptr + 4, query_begin, mask=is_tile)
            tl.store(slot_ptr + 5, query_end, mask=is_tile)


@triton.jit
def _end(ids_ptr, place, own, is_first, seq_len, padding, n_halvings, CHUNKED: tl.constexpr):
    """Where the bucket of each first place ends, by halving what lies behind it."""
    low, high = place + 1, place * 0 + seq_len
    for _ in range(n_halvings):
        is_open = is_first & (low < high)
        middle = (low + high) // 2
        later = tl.load(ids_ptr + middle, mask=is_open, other=0).to(tl.int32)
        is_behind = later != own
        if CHUNKED:
            is_behind = (later == padding) & (own != padding)
        high = tl.where(is_open & is_behind, middle, high)
        low = tl.where(is_open & ~is_behind, middle + 1, low)
    return high


def cut(
    in_order: Tensor,
    places: Tensor | None,
    query_bounds: Tensor | None,
    order: Tensor,
    table: Tensor,
    n_buckets: int,
    block: int,
    *,
    chunked: bool,
) -> None:
    """Fills order [BH, R, S] and table [BH, R, slots, 4] from sorted ids and their places [BH, R, S].

    n_buckets marks padding. Without places there is one bucket, in the order that the rows have. With query_bounds
    (`HeldRows.query_bounds`) the table is 6 wide.
    """
    n_units, n_rounds, seq_len = order.shape
    _build_table[(triton.cdiv(seq_len, PLACES), n_units * n_rounds)](
        in_order, in_order if places is None else places, order if query_bounds is None else query_bounds,
        order, table, seq_len, table.shape[2], n_buckets, seq_len.bit_length(),
        SORTED=places is not None,
        CHUNKED=chunked,
        HELD=query_bounds is not None,
        BLOCK=block,
        PLACES=PLACES,
    )  # fmt: skip
