"""Forward: one round for a tile of queries, merged into the running softmax of the rounds before.

A program takes the C.block rows of one tile, wherever they lie, and the keys that they see, block by block. Every
row is a query of one tile of a round, so programs never write to the same place and sums have one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reformer_dist.ops.lsh.kernels.pairs import (
    gather,
    kept,
    keys_in_sight,
    meetings,
    meets,
    product,
    rows_at,
    scatter,
    token_keys,
    unwrapped,
)


@triton.jit(do_not_specialize=["first_unit", "round_", "seed", "threshold", "n_tiles"])
def attend_round(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, o_ptr, top_ptr, weight_ptr,
    q_strides, k_strides, v_strides, out_strides,
    order_ptr, table_ptr, codes_ptr, unit_ptr, position_ptr,
    first_unit, n_heads, seq_len, n_tiles, round_, scale, threshold, keep_scale, seed,
    FIRST: tl.constexpr, LAST: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """q, k, v, out [B, H, S, D]; lse [B, H, S]; order [U, R, S] and the rest [U, ...] of U units at hand.

    FIRST: there are no sums yet. LAST: the output is made of them, and they are not written. `scale` is that of
    scores in base 2, in which `top` is kept too.
    """
    BLOCK: tl.constexpr = C.block
    BLOCK_D: tl.constexpr = C.block_d
    tile, unit = tl.program_id(0), tl.program_id(1)
    table_ptr += ((unit * C.n_rounds + round_) * n_tiles + tile) * 5
    query_begin, query_end = tl.load(table_ptr + 3), tl.load(table_ptr + 4)
    if query_begin == query_end:
        return
    first, begin, end = tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2)
    order_ptr += unit.to(tl.int64) * C.n_rounds * seq_len
    codes_ptr += unit.to(tl.int64) * C.n_rounds * seq_len
    batch, head = ((first_unit + unit) // n_heads).to(tl.int64), ((first_unit + unit) % n_heads).to(tl.int64)
    k_ptr += batch * k_strides[0] + head * k_strides[1]
    v_ptr += batch * v_strides[0] + head * v_strides[1]
    state = unit.to(tl.int64) * seq_len

    place = first + tl.arange(0, C.block)
    is_query = (place >= query_begin) & (place < query_end)
    row = tl.load(order_ptr + round_ * seq_len + place, mask=is_query, other=0)
    q = gather(q_ptr + batch * q_strides[0] + head * q_strides[1], row, q_strides[2], is_query, C)
    if FIRST:
        o = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        top = tl.full([BLOCK], -1e30, tl.float32)
        weight = tl.zeros([BLOCK], tl.float32)
    else:
        o = gather(o_ptr + state * C.head_dim, row, C.head_dim, is_query, C)
        top = tl.load(top_ptr + state + row, mask=is_query, other=-1e30)
        weight = tl.load(weight_ptr + state + row, mask=is_query, other=0.0)
    if C.drops:
        query_keys = token_keys(row, round_, unit, unit_ptr, position_ptr, seed, True, C)

    place = unwrapped(place, round_, seq_len, C)
    start, stop = keys_in_sight(unwrapped(first, round_, seq_len, C), begin, end, C)
    for block in range(start, stop, C.block):
        key_place = block + tl.arange(0, C.block)
        key_row, is_key, _ = rows_at(order_ptr, key_place, begin, end, round_, seq_len, C)
        k = gather(k_ptr, key_row, k_strides[2], is_key, C)
        v = gather(v_ptr, key_row, v_strides[2], is_key, C)
        scores = product(q, tl.trans(k), C) * scale
        if C.counts_once:
            scores -= tl.log2(meetings(codes_ptr, row[:, None], key_row[None, :], seq_len, C))
        sees = meets(place[:, None], key_place[None, :], row[:, None], key_row[None, :], begin, C)
        scores = tl.where(sees & is_query[:, None] & is_key[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        weight = weight * fade + tl.sum(p, 1)
        if C.drops:
            key_keys = token_keys(key_row, round_, unit, unit_ptr, position_ptr, seed, False, C)
            p = tl.where(kept(query_keys[:, None], key_keys[None, :], threshold), p * keep_scale, 0.0)
        o = o * fade[:, None] + product(p.to(v.dtype), v, C)
        top = new_top

    if LAST:
        alone = weight == 0.0
        own = gather(v_ptr, row, v_strides[2], is_query & alone, C).to(tl.float32)
        o = tl.where(alone[:, None], own, o / tl.where(alone, 1.0, weight)[:, None])
        out_ptr += batch * out_strides[0] + head * out_strides[1]
        scatter(out_ptr, row, out_strides[2], is_query, o, C)
        lse = tl.where(alone, float("inf"), (top + tl.log2(weight)) * 0.6931471805599453)
        tl.store(lse_ptr + first_unit.to(tl.int64) * seq_len + state + row, lse, mask=is_query)
    else:
        scatter(o_ptr + state * C.head_dim, row, C.head_dim, is_query, o, C)
        tl.store(top_ptr + state + row, top, mask=is_query)
        tl.store(weight_ptr + state + row, weight, mask=is_query)
