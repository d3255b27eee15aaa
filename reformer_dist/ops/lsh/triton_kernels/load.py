"""Loads and stores of the attention kernels: a tile, and the blocks of rows beside it in the sorted order.

A *slot* is an index into one round's sorted order of a head's rows. Under a wrapping chunk rule, slots run on
through all rounds, each padded to whole chunks, so that a chunk's neighbors are always at adjacent slots.

C is the `tiles.KernelConstants` of a call: a kernel is compiled for each. The NamedTuples exist at compile time
only; they are built inside the kernels, which every supported version of Triton accepts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

FAR = tl.constexpr(2**29)  # farther apart than any two slots


class HeadRows(NamedTuple):
    """The rows of one head: the pointer to the first, and the stride between rows."""

    ptr: Any
    stride: Any


class SortedRound(NamedTuple):
    """One round of a head's sorted order."""

    order_ptr: Any
    """The head's order, int32 [R, S]."""
    round_: Any
    seq_len: Any


class TileBounds(NamedTuple):
    """Slots of a tile and of its bucket: an entry of the table, see `tiles.Tiles.table`."""

    first: Any
    begin: Any
    key_end: Any
    end: Any
    query_begin: Any
    query_end: Any


class Tile(NamedTuple):
    """C.block rows of a bucket, as queries and as keys; those outside its bounds are masked."""

    first: Any
    """Its first slot; this and the slot of each row count through all rounds if they wrap."""
    slot: Any
    row: Any
    is_row: Any
    is_query: Any
    is_key: Any
    q: Any
    k: Any
    v: Any


class RowBlock(NamedTuple):
    """C.other_block rows beside a tile, not yet loaded."""

    slot: Any
    row: Any
    is_row: Any
    round_: Any
    """Round of each row, which differs from the tile's only where rounds wrap."""


def grid_of(n_heads: int, seq_len: int, n_rows: int) -> tuple[int]:
    """Grid of programs for n_rows rows of one head each, which read their place by `head_and_rows`.

    One dimension: CUDA limits the others to 65535, which is less than batch rows x heads may be.
    """
    return (n_heads * triton.cdiv(seq_len, n_rows),)


@triton.jit
def head_and_rows(seq_len, ROWS: tl.constexpr):
    """The head of this program, and its rows [ROWS], of which the last ones may be beyond seq_len."""
    n_blocks = tl.cdiv(seq_len, ROWS)
    program = tl.program_id(0)
    return program // n_blocks, program % n_blocks * ROWS + tl.arange(0, ROWS)


@triton.jit
def head_rows(x_ptr, strides, head, n_heads):
    """Rows of a (batch row, head) index in x [B, H, S, D] with these strides of B, H and S."""
    start = (head // n_heads).to(tl.int64) * strides[0] + (head % n_heads).to(tl.int64) * strides[1]
    return HeadRows(x_ptr + start, strides[2])


@triton.jit
def gather(x, row, is_row, C: tl.constexpr):
    """Rows [n, C.block_d] of x: HeadRows at row [n]; zeros where is_row is False."""
    column = tl.arange(0, C.block_d)
    mask = is_row[:, None] & (column < C.head_dim)[None, :]
    return tl.load(x.ptr + row.to(tl.int64)[:, None] * x.stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def scatter(x, row, is_row, value, C: tl.constexpr):
    """Stores value [n, C.block_d] in rows of x: HeadRows, in its type: the reverse of `gather`."""
    column = tl.arange(0, C.block_d)
    mask = is_row[:, None] & (column < C.head_dim)[None, :]
    target = x.ptr + row.to(tl.int64)[:, None] * x.stride + column[None, :]
    tl.store(target, value.to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def store(value, x_ptr, strides, tile, first_head, n_heads, seq_len, C: tl.constexpr):
    """Stores a tile's rows in x [B, H, S, D] if there is one round, else in this round's of x [BH, R, S, D]."""
    round_, head = tl.program_id(1), tl.program_id(2)
    if C.n_rounds == 1:
        x = head_rows(x_ptr, strides, first_head + head, n_heads)
    else:
        start = (head.to(tl.int64) * C.n_rounds + round_) * seq_len
        x = HeadRows(x_ptr + start * C.head_dim, C.head_dim)
    scatter(x, tile.row, tile.is_row, value, C)


@triton.jit
def line_of_program(C: tl.constexpr):
    """Index of this program's head and round."""
    return (tl.program_id(2) * C.n_rounds + tl.program_id(1)).to(tl.int64)


@triton.jit
def load_bounds(table_ptr, n_tiles, entry, C: tl.constexpr):
    """TileBounds of an entry of this program's line: begin == end if it is empty."""
    COLUMNS: tl.constexpr = 6 if C.bounded else 4
    table_ptr += (line_of_program(C) * n_tiles + entry) * COLUMNS
    first, begin, key_end, end = (
        tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2), tl.load(table_ptr + 3)
    )  # fmt: skip
    query_begin, query_end = begin, end
    if C.bounded:
        query_begin, query_end = tl.load(table_ptr + 4), tl.load(table_ptr + 5)
    return TileBounds(first, begin, key_end, end, query_begin, query_end)


@triton.jit
def sorted_round(order_ptr, seq_len, C: tl.constexpr):
    """SortedRound of this program, of order [BH, R, S]."""
    head = tl.program_id(2)
    return SortedRound(order_ptr + head.to(tl.int64) * C.n_rounds * seq_len, tl.program_id(1), seq_len)


@triton.jit
def load_tile(q, k, v, order, bounds, C: tl.constexpr):
    """The Tile with these bounds of order: SortedRound, its rows loaded from q, k and v: HeadRows."""
    slot = bounds.first + tl.arange(0, C.block)
    is_row, is_key = slot < bounds.end, slot < bounds.key_end
    is_query = is_row
    if C.sharded:
        is_query = is_row & (slot >= bounds.query_begin) & (slot < bounds.query_end)
    row = tl.load(order.order_ptr + order.round_ * order.seq_len + slot, mask=is_row, other=0)
    tile_q = gather(q, row, is_row, C)
    tile_k = tile_q if C.shared else gather(k, row, is_key, C)
    tile_v = gather(v, row, is_key, C)
    first, slot = unwrapped(bounds.first, order, C), unwrapped(slot, order, C)
    return Tile(first, slot, row, is_row, is_query, is_key, tile_q, tile_k, tile_v)


@triton.jit
def load_other_rows(i, before, first, order, begin, end, C: tl.constexpr):
    """RowBlock number i of those around the tile from slot `first`; rows are those at slots begin to end - 1.

    The tile itself is skipped, except where rounds wrap: there its slots after the round's end are other rows.
    """
    slot = first + (i - before) * C.other_block + tl.arange(0, C.other_block)
    if not C.wraps:
        slot += (i >= before).to(tl.int32) * C.block
    row, is_row, round_ = _load_rows(order, slot, begin, end, C)
    if C.wraps:
        is_inside = (slot >= first) & (slot < first + C.block)
        is_row = is_row & (~is_inside | (slot >= unwrapped(end, order, C)))
    return RowBlock(slot, row, is_row, round_)


@triton.jit
def _load_rows(order, slot, begin, end, C: tl.constexpr):
    """(row, whether there is one, its round) at each slot."""
    if C.wraps:
        round_len = padded_len(order.seq_len, C)
        slot = slot % (C.n_rounds * round_len)
        round_ = slot // round_len
        slot = slot % round_len
    else:
        round_ = slot * 0 + order.round_
    is_row = (slot >= begin) & (slot < end)
    return tl.load(order.order_ptr + round_ * order.seq_len + slot, mask=is_row, other=0), is_row, round_


@triton.jit
def padded_len(seq_len, C: tl.constexpr):
    """Slots of a round of whole chunks."""
    return tl.cdiv(tl.cdiv(seq_len, C.round_to) * C.round_to, C.span) * C.span


@triton.jit
def unwrapped(slot, order, C: tl.constexpr):
    """The slot counted through all rounds if they wrap, from a start that leaves room for the chunks before."""
    if C.wraps:
        slot += (order.round_ + C.n_rounds * (C.before + C.after)) * padded_len(order.seq_len, C)
    return slot


@triton.jit
def query_slots(slot, is_query, bounds, C: tl.constexpr):
    """Slots of queries; for other rows one that is far from every key.

    With C.by_rank, slots count from the tile's first, and other rows have theirs, too: see `pair_mask.attends`.
    """
    if C.by_rank:
        slot -= bounds.first
    else:
        slot = tl.where(is_query, slot, -FAR)
    return slot


@triton.jit
def key_slots(slot, is_key, bounds, C: tl.constexpr):
    """Slots of keys; for other rows one that is far from every query.

    With C.by_rank, slots count from the tile's first, and are far only in a bucket without keys.
    """
    if C.by_rank:
        slot += tl.where(bounds.begin < bounds.key_end, 0, FAR) - bounds.first
    else:
        slot = tl.where(is_key, slot, FAR)
    return slot


@triton.jit
def count_key_blocks(first, bounds, C: tl.constexpr):
    """(blocks before, blocks in all) of other keys in reach of the C.block queries from slot `first`."""
    begin = bounds.begin
    if C.chunked:
        start = ((first - begin) // C.span - C.before) * C.span + begin
        stop = ((first + C.block - 1 - begin) // C.span + C.after + 1) * C.span + begin
    else:
        start = first - (C.span - 1)
        stop = first + C.block
        if not C.causal:
            stop += C.span - 1
    return _count_blocks(start, stop, first, bounds, C)


@triton.jit
def count_query_blocks(first, bounds, C: tl.constexpr):
    """(blocks before, blocks in all) of other queries that have the C.block keys from slot `first` in reach."""
    begin = bounds.begin
    if C.chunked:
        start = ((first - begin) // C.span - C.after) * C.span + begin
        stop = ((first + C.block - 1 - begin) // C.span + C.before + 1) * C.span + begin
    else:
        start = first
        if not C.causal:
            start -= C.span - 1
        stop = first + C.block + C.span - 1
    return _count_blocks(start, stop, first, bounds, C)


@triton.jit
def _count_blocks(start, stop, first, bounds, C: tl.constexpr):
    """(blocks before the tile, blocks in all) between slots start and stop; the tile's own are not counted.

    Blocks are aligned to `first`, so that which rows share one depends on ranks in the bucket alone.
    """
    begin, end = bounds.begin, bounds.key_end
    if not C.wraps:
        start = tl.maximum(start, begin)
        stop = tl.minimum(stop, end)
    before = tl.cdiv(tl.maximum(first - start, 0), C.other_block)
    after = tl.cdiv(tl.maximum(stop - first - C.block, 0), C.other_block)
    if C.wraps:
        after += C.block // C.other_block
    has_keys = (begin < end).to(tl.int32)
    return before * has_keys, (before + after) * has_keys
