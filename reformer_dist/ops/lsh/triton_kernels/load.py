"""What the attention kernels share: rows found through the order, who meets whom, dropout, products.

A *place* is an index into a round's order of a unit's rows. Under a wrapping chunk rule it is one in all rounds
behind one another, each padded to whole chunks, so that a chunk's neighbours are always the places next to it.

C is the `tiles.KernelConstants` of a call: a kernel is compiled for each.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(2**29)  # farther than any two places
# The interpreter multiplies bfloat16 as if it were integers.
WIDENS = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def product(a, b, C: tl.constexpr):
    """a @ b with float32 sums."""
    if WIDENS:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=C.precision)


@triton.jit
def gather(x_ptr, row, row_stride, is_row, C: tl.constexpr):
    """[rows, C.block_d] of rows [row, C.head_dim]; zeros where there is no row."""
    column = tl.arange(0, C.block_d)
    mask = is_row[:, None] & (column < C.head_dim)[None, :]
    return tl.load(x_ptr + row.to(tl.int64)[:, None] * row_stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def scatter(x_ptr, row, row_stride, is_row, value, C: tl.constexpr):
    """The reverse of `gather`, in the type that x_ptr points to."""
    column = tl.arange(0, C.block_d)
    mask = is_row[:, None] & (column < C.head_dim)[None, :]
    target = x_ptr + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    tl.store(target, value.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def of_unit(x_ptr, strides, unit, n_heads):
    """Where a unit's rows of [B, H, S, D] begin."""
    return x_ptr + (unit // n_heads).to(tl.int64) * strides[0] + (unit % n_heads).to(tl.int64) * strides[1]


@triton.jit
def write(value, x_ptr, strides, first_unit, row, is_row, n_heads, seq_len, C: tl.constexpr):
    """To rows of [B, H, S, D] if there is one round, else to those [BH, R, S, D] of this program's round."""
    round_, unit = tl.program_id(1), tl.program_id(2)
    if C.n_rounds == 1:
        scatter(of_unit(x_ptr, strides, first_unit + unit, n_heads), row, strides[2], is_row, value, C)
    else:
        of_round = (unit.to(tl.int64) * C.n_rounds + round_) * seq_len
        scatter(x_ptr + of_round * C.head_dim, row, C.head_dim, is_row, value, C)


@triton.jit
def tile_at(table_ptr, unit, round_, n_tiles, C: tl.constexpr):
    """Of this program: first place, then as in `tiles.Tiles`: begin, key end, end, query begin, query end."""
    COLUMNS: tl.constexpr = 6 if C.held else 4
    table_ptr += ((unit * C.n_rounds + round_).to(tl.int64) * n_tiles + tl.program_id(0)) * COLUMNS
    first, begin, key_end, end = (
        tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2), tl.load(table_ptr + 3)
    )  # fmt: skip
    query_begin, query_end = begin, end
    if C.held:
        query_begin, query_end = tl.load(table_ptr + 4), tl.load(table_ptr + 5)
    return first, begin, key_end, end, query_begin, query_end


@triton.jit
def queries_among(place, is_row, query_begin, query_end, C: tl.constexpr):
    """Which of the places that have rows are those of queries: all, but where rows are held."""
    if C.held:
        is_row = is_row & (place >= query_begin) & (place < query_end)
    return is_row


@triton.jit
def rows_at(order_ptr, place, begin, end, round_, seq_len, C: tl.constexpr):
    """(row, whether there is one, its round) at each place; only those from begin to before end are rows."""
    if C.wraps:
        round_len = tl.cdiv(tl.cdiv(seq_len, C.round_to) * C.round_to, C.span) * C.span
        place = place % (C.n_rounds * round_len)
        round_ = place // round_len
        place = place % round_len
    else:
        round_ = place * 0 + round_
    is_row = (place >= begin) & (place < end)
    return tl.load(order_ptr + round_ * seq_len + place, mask=is_row, other=0), is_row, round_


@triton.jit
def unwrapped(place, round_, seq_len, C: tl.constexpr):
    """The place in all rounds behind one another, far enough from 0 for the chunks before it; see above."""
    if C.wraps:
        round_len = tl.cdiv(tl.cdiv(seq_len, C.round_to) * C.round_to, C.span) * C.span
        place += (round_ + C.n_rounds * (C.before + C.after)) * round_len
    return place


@triton.jit
def query_places(place, is_query):
    """Places of queries, and for others one that is far from every key."""
    return tl.where(is_query, place, -FAR)


@triton.jit
def key_places(place, is_key):
    """Places of keys, and for others one that is far from every query."""
    return tl.where(is_key, place, FAR)


@triton.jit
def blocks_of_keys(first, begin, key_end, C: tl.constexpr):
    """How many blocks of other keys the C.block queries from `first` may see: of those before, and in all."""
    if C.chunked:
        start = ((first - begin) // C.span - C.before) * C.span + begin
        stop = ((first + C.block - 1 - begin) // C.span + C.after + 1) * C.span + begin
    else:
        start = first - (C.span - 1)
        stop = first + C.block
        if not C.causal:
            stop += C.span - 1
    return _blocks(start, stop, first, begin, key_end, C)


@triton.jit
def blocks_of_queries(first, begin, key_end, C: tl.constexpr):
    """Likewise, of other queries that may see the C.block keys from `first`."""
    if C.chunked:
        start = ((first - begin) // C.span - C.after) * C.span + begin
        stop = ((first + C.block - 1 - begin) // C.span + C.before + 1) * C.span + begin
    else:
        start = first
        if not C.causal:
            start -= C.span - 1
        stop = first + C.block + C.span - 1
    return _blocks(start, stop, first, begin, key_end, C)


@triton.jit
def _blocks(start, stop, first, begin, end, C: tl.constexpr):
    """(blocks before `first`, all but those of the tile), of C.other_block rows each.

    They are whole from `first` on, so that which rows share a block depends on ranks in the bucket alone.
    """
    if not C.wraps:
        start = tl.maximum(start, begin)
        stop = tl.minimum(stop, end)
    before = tl.cdiv(tl.maximum(first - start, 0), C.other_block)
    behind = tl.cdiv(tl.maximum(stop - first - C.block, 0), C.other_block)
    if C.wraps:
        behind += C.block // C.other_block
    has_keys = (begin < end).to(tl.int32)
    return before * has_keys, (before + behind) * has_keys


@triton.jit
def other_rows(i, before, first, order_ptr, begin, end, round_, seq_len, C: tl.constexpr):
    """(place, row, whether there is one, its round) in the i-th of the blocks around the tile from `first`.

    The tile is left out, but where rounds wrap: there, what lies behind the round's end in it are others.
    """
    place = first + (i - before) * C.other_block + tl.arange(0, C.other_block)
    if not C.wraps:
        place += (i >= before).to(tl.int32) * C.block
    row, is_row, of_round = rows_at(order_ptr, place, begin, end, round_, seq_len, C)
    if C.wraps:
        is_inside = (place >= first) & (place < first + C.block)
        is_row = is_row & (~is_inside | (place >= unwrapped(end, round_, seq_len, C)))
    return place, row, is_row, of_round


@triton.jit
def score_factors(k, scale, C: tl.constexpr):
    """[keys] by which products with keys k [keys, D] become scores in base 2. Shared keys are k / |k|."""
    # of a fp16 number, so that weights of pairs stay in its range
    SHORTEST: tl.constexpr = 2.0**-10 if k.dtype == tl.float16 else 1e-12
    if C.shared:
        wide = k.to(tl.float32)
        factors = scale * LOG2_E / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), SHORTEST)
    else:
        factors = tl.full([k.shape[0]], LOG2_E, tl.float32) * scale
    return factors


@triton.jit
def near(distance, C: tl.constexpr):
    """By the distance of two places, or of two chunks: query less key."""
    if C.chunked:
        is_near = (distance <= C.before) & (distance >= -C.after)
    elif C.causal:
        is_near = (distance >= 0) & (distance < C.span)
    else:
        is_near = (distance > -C.span) & (distance < C.span)
    return is_near


@triton.jit
def meets(query_place, key_place, query_row, key_row, begin, C: tl.constexpr):
    """Whether a query meets a key by the rule; broadcasts."""
    if C.chunked:
        is_near = near((query_place - begin) // C.span - (key_place - begin) // C.span, C)
        # rows of a unit are in order of position
        if C.causal:
            is_near = is_near & (key_row <= query_row)
        if not C.sees_self:
            is_near = is_near & (key_row != query_row)
    else:
        is_near = near(query_place - key_place, C)
        if not C.sees_self:
            is_near = is_near & (query_place != key_place)
    return is_near


@triton.jit
def meetings(codes_ptr, query_row, key_row, seq_len, C: tl.constexpr):
    """In how many rounds each pair meets, at least 1: float32 in the shape that rows broadcast to."""
    number = (query_row - key_row).to(tl.float32) * 0.0
    for r in range(C.n_rounds):
        query_code = tl.load(codes_ptr + r * seq_len + query_row)
        key_code = tl.load(codes_ptr + r * seq_len + key_row)
        number += near(query_code - key_code, C).to(tl.float32)
    return tl.maximum(number, 1.0)


@triton.jit
def mix(x):
    """`ops.counter_dropout`'s bijection of 32-bit integers."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def token_keys(row, round_, who, seq_len, seed, IS_QUERY: tl.constexpr, C: tl.constexpr):
    """`ops.counter_dropout.token_keys` of rows: uint32."""
    position, unit_number = row, who
    if C.held:
        position, unit_number = tl.load(who + row), tl.load(who + seq_len + row)
    salt = (round_.to(tl.uint32) * 0x9E3779B9) ^ seed
    if IS_QUERY:
        salt ^= 0x5BD1E995
    key = mix(position.to(tl.uint32) + salt)
    return mix(key ^ (unit_number.to(tl.uint32) * 0x85EBCA6B))


@triton.jit
def dropout_factors(query_row, key_row, round_, who, seq_len, draw, C: tl.constexpr):
    """1 / (1 - dropout) where `ops.counter_dropout` keeps a pair, else 0; draw = (seed, threshold, factor)."""
    query_keys = token_keys(query_row, round_, who, seq_len, draw[0], True, C)
    key_keys = token_keys(key_row, round_, who, seq_len, draw[0], False, C)
    is_kept = (mix(query_keys ^ key_keys) & 0x7FFFFFFF) >= draw[1]
    return tl.where(is_kept, draw[2], 0.0)


@triton.jit
def who_is_here(who_ptr, unit, C: tl.constexpr):
    """A unit's number in its step, or where those of held rows are: see `Tiles.who`."""
    who = who_ptr
    if C.drops and not C.held:
        who = tl.load(who_ptr + unit)
    return who
