"""What the attention kernels share: rows found through the order, who meets whom, dropout, products.

A *place* is an index into a round's order of a unit's rows. Under a wrapping chunk rule it is one in all rounds
behind one another, each padded to whole chunks, so that a chunk's neighbours are always the places next to it.

C is the `tiles.Constants` of a call: a kernel is compiled for each.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
def keys_in_sight(first, begin, end, C: tl.constexpr):
    """First place and the one behind the last that any of the C.block queries from `first` may see."""
    if C.chunked:
        start = ((first - begin) // C.span - C.before) * C.span + begin
        stop = ((first + C.block - 1 - begin) // C.span + C.after + 1) * C.span + begin
        if not C.wraps:
            start = tl.maximum(start, begin)
    else:
        # whole blocks back: the column of a key depends on ranks in the bucket alone
        reach = tl.minimum(C.span - 1, tl.maximum(first - begin, 0))
        start = first - tl.cdiv(reach, C.block) * C.block
        stop = first + C.block
        if not C.causal:
            stop += C.span - 1
    if not C.wraps:
        stop = tl.minimum(stop, end)
    return start, stop


@triton.jit
def queries_in_sight(first, begin, query_begin, query_end, C: tl.constexpr):
    """Likewise, the queries that may see any of the C.block keys from `first`."""
    if C.chunked:
        start = ((first - begin) // C.span - C.after) * C.span + begin
        stop = ((first + C.block - 1 - begin) // C.span + C.before + 1) * C.span + begin
    else:
        start = first
        if not C.causal:
            start -= C.span - 1
        stop = first + C.block + C.span - 1
    if not C.wraps:
        start = tl.maximum(start, query_begin)
        stop = tl.minimum(stop, query_end)
    return start, stop


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
    """Whether a query meets a key by the rule, were there rows at both places; broadcasts."""
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
def masked(
    scores,
    query_place,
    key_place,
    query_row,
    key_row,
    is_query,
    is_key,
    begin,
    codes_ptr,
    seq_len,
    C: tl.constexpr,
):
    """Scores in base 2 of the pairs that meet, -inf of others. The rest broadcasts to the shape of the scores."""
    if C.counts_once:
        scores -= tl.log2(meetings(codes_ptr, query_row, key_row, seq_len, C))
    sees = meets(query_place, key_place, query_row, key_row, begin, C)
    return tl.where(sees & is_query & is_key, scores, float("-inf"))


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
def token_keys(row, round_, unit, numbers_ptr, seed, IS_QUERY: tl.constexpr):
    """`ops.counter_dropout.token_keys` of rows: uint32."""
    salt = (round_.to(tl.uint32) * 0x9E3779B9) ^ seed
    if IS_QUERY:
        salt ^= 0x5BD1E995
    key = mix(row.to(tl.uint32) + salt)
    return mix(key ^ (tl.load(numbers_ptr + unit).to(tl.uint32) * 0x85EBCA6B))


@triton.jit
def dropout_factors(query_row, key_row, round_, unit, numbers_ptr, draw):
    """1 / (1 - dropout) where `ops.counter_dropout` keeps a pair, else 0; draw = (seed, threshold, factor)."""
    query_keys = token_keys(query_row, round_, unit, numbers_ptr, draw[0], True)
    key_keys = token_keys(key_row, round_, unit, numbers_ptr, draw[0], False)
    is_kept = (mix(query_keys ^ key_keys) & 0x7FFFFFFF) >= draw[1]
    return tl.where(is_kept, draw[2], 0.0)
