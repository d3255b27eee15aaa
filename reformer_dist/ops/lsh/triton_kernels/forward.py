"""Forward: the softmax of one round for a tile of queries.

A program takes the C.block rows of one tile, wherever they lie, first as each other's keys, then the other keys
that they see, block by block: most buckets are one tile, whose rows so are loaded once and all at a time. Every
row is a query of one tile of a round, so programs never write to the same place and sums have one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reformer_dist.ops.lsh.triton_kernels.pairs import (
    LN_2,
    blocks_of_keys,
    dropout_factors,
    gather,
    key_places,
    meetings,
    meets,
    of_unit,
    other_rows,
    product,
    queries_among,
    query_places,
    score_factors,
    tile_at,
    unwrapped,
    who_is_here,
    write,
)


@triton.jit(do_not_specialize=["first_unit", "n_tiles"])
def attend_round(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_strides, k_strides, v_strides, out_strides,
    order_ptr, table_ptr, codes_ptr, who_ptr, first_unit, n_heads, seq_len, n_tiles, scale, draw, C: tl.constexpr,
):  # fmt: skip
    """q, k, v [B, H, S, D]; order [BH, R, S] and the rest [BH, R, ...] of the BH units at hand.

    Of one round it makes the whole: out [B, H, S, D] and lse [B, H, S]. Of several, `rowwise.merge_rounds` does,
    from out [BH, R, S, D] and lse [BH, R, S] of each, the latter in base 2 and -inf for who met nobody.
    """
    BLOCK: tl.constexpr = C.block
    BLOCK_D: tl.constexpr = C.block_d
    round_, unit = tl.program_id(1), tl.program_id(2)
    first, begin, key_end, end, query_begin, query_end = tile_at(table_ptr, unit, round_, n_tiles, C)
    if begin == end:
        return
    start_row = unit.to(tl.int64) * C.n_rounds * seq_len
    order_ptr += start_row
    codes_ptr += start_row
    k_ptr = of_unit(k_ptr, k_strides, first_unit + unit, n_heads)
    v_ptr = of_unit(v_ptr, v_strides, first_unit + unit, n_heads)
    who = who_is_here(who_ptr, unit, C)

    place = first + tl.arange(0, BLOCK)
    is_row, is_key = place < end, place < key_end
    is_query = queries_among(place, is_row, query_begin, query_end, C)
    row = tl.load(order_ptr + round_ * seq_len + place, mask=is_row, other=0)
    q = gather(of_unit(q_ptr, q_strides, first_unit + unit, n_heads), row, q_strides[2], is_row, C)
    k = q if C.shared else gather(k_ptr, row, k_strides[2], is_key, C)
    v = gather(v_ptr, row, v_strides[2], is_key, C)
    o, weight = tl.zeros([BLOCK, BLOCK_D], tl.float32), tl.zeros([BLOCK], tl.float32)
    top = tl.full([BLOCK], -1e30, tl.float32)  # finite, so that differences of two are 0, not nan

    first, place = unwrapped(first, round_, seq_len, C), unwrapped(place, round_, seq_len, C)
    queries = (q, query_places(place, is_query), row)
    pairs = (begin, codes_ptr, seq_len, round_, who, scale, draw)
    softmax = absorb((o, top, weight), queries, k, v, key_places(place, is_key), row, pairs, C)
    before, others = blocks_of_keys(first, begin, key_end, C)
    for i in range(others):
        other_place, other_row, is_other, _ = other_rows(
            i, before, first, order_ptr, begin, key_end, round_, seq_len, C
        )
        other_k = gather(k_ptr, other_row, k_strides[2], is_other, C)
        other_v = gather(v_ptr, other_row, v_strides[2], is_other, C)
        softmax = absorb(
            softmax, queries, other_k, other_v, key_places(other_place, is_other), other_row, pairs, C
        )

    o, top, weight = softmax
    alone = weight == 0.0
    weight = tl.where(alone, 1.0, weight)
    o /= weight[:, None]
    lse = tl.where(alone, float("-inf"), top + tl.log2(weight))
    if C.n_rounds == 1:
        o += gather(v_ptr, row, v_strides[2], is_row & alone, C).to(tl.float32)
        lse = tl.where(alone, float("inf"), lse * LN_2)
        lse_ptr += first_unit.to(tl.int64) * seq_len
    lse_ptr += (unit.to(tl.int64) * C.n_rounds + round_) * seq_len
    tl.store(lse_ptr + row, lse, mask=is_row)
    write(o, out_ptr, out_strides, first_unit, row, is_row, n_heads, seq_len, C)


@triton.jit
def absorb(softmax, queries, k, v, key_place, key_row, pairs, C: tl.constexpr):
    """The softmax with a block of keys more. softmax: (o, top, weight); queries: (q, places, rows)."""
    o, top, weight = softmax
    q, query_place, query_row = queries
    begin, codes_ptr, seq_len, round_, who, scale, draw = pairs
    scores = product(q, tl.trans(k), C) * score_factors(k, scale, C)[None, :]
    if C.counts_once:
        scores -= tl.log2(meetings(codes_ptr, query_row[:, None], key_row[None, :], seq_len, C))
    sees = meets(query_place[:, None], key_place[None, :], query_row[:, None], key_row[None, :], begin, C)
    scores = tl.where(sees, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - new_top[:, None])
    fade = tl.exp2(top - new_top)
    weight = weight * fade + tl.sum(p, 1)
    if C.drops:
        p *= dropout_factors(query_row[:, None], key_row[None, :], round_, who, seq_len, draw, C)
    o = o * fade[:, None] + product(p.to(v.dtype), v, C)
    return o, new_top, weight
