"""Forward: one round for a tile of queries, merged into the running softmax of the rounds before.

A program takes the C.block rows of one tile, wherever they lie, and the keys that they see, block by block. Every
row is a query of one tile of a round, so programs never write to the same place and sums have one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reformer_dist.ops.lsh.kernels.pairs import (
    dropout_factors,
    gather,
    keys_in_sight,
    masked,
    of_unit,
    product,
    rows_at,
    scatter,
    unwrapped,
)


@triton.jit(do_not_specialize=["first_unit", "round_", "n_tiles"])
def attend_round(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, o_ptr, top_ptr, weight_ptr,
    q_strides, k_strides, v_strides, out_strides, order_ptr, table_ptr, codes_ptr, numbers_ptr,
    first_unit, n_heads, seq_len, n_tiles, round_, scale, draw,
    FIRST: tl.constexpr, LAST: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """q, k, v, out [B, H, S, D]; lse [B, H, S]; order [U, R, S] and the rest [U, ...] of U units at hand.

    FIRST: there are no sums yet. LAST: the output is made of them, and they are not written. `scale` is that of
    scores in base 2, in which `top` is kept too.
    """
    BLOCK: tl.constexpr = C.block
    unit = tl.program_id(1)
    table_ptr += ((unit * C.n_rounds + round_) * n_tiles + tl.program_id(0)) * 5
    query_begin, query_end = tl.load(table_ptr + 3), tl.load(table_ptr + 4)
    if query_begin == query_end:
        return
    first, begin, end = tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2)
    start_row = unit.to(tl.int64) * seq_len
    order_ptr += start_row * C.n_rounds
    codes_ptr += start_row * C.n_rounds
    k_ptr = of_unit(k_ptr, k_strides, first_unit + unit, n_heads)
    v_ptr = of_unit(v_ptr, v_strides, first_unit + unit, n_heads)

    place = first + tl.arange(0, BLOCK)
    is_query = (place >= query_begin) & (place < query_end)
    row = tl.load(order_ptr + round_ * seq_len + place, mask=is_query, other=0)
    place = unwrapped(place, round_, seq_len, C)
    q = gather(of_unit(q_ptr, q_strides, first_unit + unit, n_heads), row, q_strides[2], is_query, C)
    o, top, weight = so_far(o_ptr, top_ptr, weight_ptr, start_row, row, is_query, FIRST, C)

    start, stop = keys_in_sight(unwrapped(first, round_, seq_len, C), begin, end, C)
    for block in range(start, stop, BLOCK):
        key_place = block + tl.arange(0, BLOCK)
        key_row, is_key, _ = rows_at(order_ptr, key_place, begin, end, round_, seq_len, C)
        k = gather(k_ptr, key_row, k_strides[2], is_key, C)
        v = gather(v_ptr, key_row, v_strides[2], is_key, C)
        scores = masked(
            product(q, tl.trans(k), C) * scale, place[:, None], key_place[None, :], row[:, None],
            key_row[None, :], is_query[:, None], is_key[None, :], begin, codes_ptr, seq_len, C,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        weight = weight * fade + tl.sum(p, 1)
        if C.drops:
            p *= dropout_factors(row[:, None], key_row[None, :], round_, unit, numbers_ptr, draw)
        o = o * fade[:, None] + product(p.to(v.dtype), v, C)
        top = new_top

    if LAST:
        out_ptr = of_unit(out_ptr, out_strides, first_unit + unit, n_heads)
        lse_ptr += first_unit.to(tl.int64) * seq_len + start_row
        finish(v_ptr, v_strides, out_ptr, out_strides, lse_ptr, row, is_query, o, top, weight, C)
    else:
        scatter(o_ptr + start_row * C.head_dim, row, C.head_dim, is_query, o, C)
        tl.store(top_ptr + start_row + row, top, mask=is_query)
        tl.store(weight_ptr + start_row + row, weight, mask=is_query)


@triton.jit
def so_far(o_ptr, top_ptr, weight_ptr, start_row, row, is_query, FIRST: tl.constexpr, C: tl.constexpr):
    """The softmax of the rounds before, by row: sum of 2^(s - top) v, top, and sum of 2^(s - top)."""
    BLOCK: tl.constexpr = C.block
    BLOCK_D: tl.constexpr = C.block_d
    if FIRST:
        o = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        top = tl.full([BLOCK], -1e30, tl.float32)  # finite, so that differences of two are 0, not nan
        weight = tl.zeros([BLOCK], tl.float32)
    else:
        o = gather(o_ptr + start_row * C.head_dim, row, C.head_dim, is_query, C)
        top = tl.load(top_ptr + start_row + row, mask=is_query, other=-1e30)
        weight = tl.load(weight_ptr + start_row + row, mask=is_query, other=0.0)
    return o, top, weight


@triton.jit
def finish(
    v_ptr, v_strides, out_ptr, out_strides, lse_ptr, row, is_query, o, top, weight, C: tl.constexpr
):  # fmt: skip
    """Output and natural logsumexp of a whole softmax: v and inf for a query that met nobody."""
    alone = weight == 0.0
    own = gather(v_ptr, row, v_strides[2], is_query & alone, C).to(tl.float32)
    whole = tl.where(alone, 1.0, weight)
    scatter(out_ptr, row, out_strides[2], is_query, tl.where(alone[:, None], own, o / whole[:, None]), C)
    lse = tl.where(alone, float("inf"), (top + tl.log2(whole)) * 0.6931471805599453)
    tl.store(lse_ptr + row, lse, mask=is_query)
