"""Backward: one round's gradients of the rows of a tile, as keys and as queries.

With the output and the logsumexp of the whole softmax, probabilities are exp(s - lse) and no state of rounds is
needed. A program takes the C.block rows of one tile twice: as keys with the queries that see them (dk, dv), then
as queries with the keys that they see (dq). So every gradient is the sum of one program, in one order: nothing
is added atomically, and two runs agree to the last bit.
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
    queries_in_sight,
    rows_at,
    scatter,
    token_keys,
    unwrapped,
)


@triton.jit(do_not_specialize=["first_unit", "round_", "seed", "threshold", "n_tiles"])
def attend_round_backward(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr,
    dq_ptr, dk_ptr, dv_ptr, sum_q_ptr, sum_k_ptr, sum_v_ptr,
    q_strides, k_strides, v_strides, d_out_strides, dq_strides, dk_strides, dv_strides,
    order_ptr, table_ptr, codes_ptr, unit_ptr, position_ptr,
    first_unit, n_heads, seq_len, n_tiles, round_, score_scale, scale, threshold, keep_scale, seed,
    FIRST: tl.constexpr, LAST: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sums of dq, dk, dv [U, S, D] float32 get what this round adds; after the LAST they go to dq, dk, dv.

    With shared keys (C.shared) dk is led on to q = |q| k at once, and dq is the gradient of q as a whole.
    """
    BLOCK: tl.constexpr = C.block
    BLOCK_D: tl.constexpr = C.block_d
    tile, unit = tl.program_id(0), tl.program_id(1)
    table_ptr += ((unit * C.n_rounds + round_) * n_tiles + tile) * 5
    query_begin, query_end = tl.load(table_ptr + 3), tl.load(table_ptr + 4)
    first, begin, end = tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2)
    if (query_begin == query_end) & (begin == end):
        return
    order_ptr += unit.to(tl.int64) * C.n_rounds * seq_len
    codes_ptr += unit.to(tl.int64) * C.n_rounds * seq_len
    batch, head = ((first_unit + unit) // n_heads).to(tl.int64), ((first_unit + unit) % n_heads).to(tl.int64)
    q_ptr += batch * q_strides[0] + head * q_strides[1]
    k_ptr += batch * k_strides[0] + head * k_strides[1]
    v_ptr += batch * v_strides[0] + head * v_strides[1]
    d_out_ptr += batch * d_out_strides[0] + head * d_out_strides[1]
    state = unit.to(tl.int64) * seq_len
    lse_ptr += first_unit.to(tl.int64) * seq_len + state
    delta_ptr += first_unit.to(tl.int64) * seq_len + state

    # the tile's rows, be they keys, queries or both
    own_place = first + tl.arange(0, C.block)
    is_key = (own_place >= begin) & (own_place < end)
    is_query = (own_place >= query_begin) & (own_place < query_end)
    is_own = is_key | is_query
    row = tl.load(order_ptr + round_ * seq_len + own_place, mask=is_own, other=0)
    own_place = unwrapped(own_place, round_, seq_len, C)
    first = unwrapped(first, round_, seq_len, C)

    k = gather(k_ptr, row, k_strides[2], is_key, C)
    v = gather(v_ptr, row, v_strides[2], is_key, C)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    if C.drops:
        key_keys = token_keys(row, round_, unit, unit_ptr, position_ptr, seed, False, C)
    start, stop = queries_in_sight(first, begin, query_begin, query_end, C)
    for block in range(start, stop, C.block):
        place = block + tl.arange(0, C.block)
        query_row, is_other, of_round = rows_at(
            order_ptr, place, query_begin, query_end, round_, seq_len, C
        )
        q = gather(q_ptr, query_row, q_strides[2], is_other, C)
        d_out = gather(d_out_ptr, query_row, d_out_strides[2], is_other, C)
        lse = tl.load(lse_ptr + query_row, mask=is_other, other=float("inf"))
        delta = tl.load(delta_ptr + query_row, mask=is_other, other=0.0)
        scores = product(k, tl.trans(q), C) * score_scale
        if C.counts_once:
            scores -= tl.log2(meetings(codes_ptr, query_row[None, :], row[:, None], seq_len, C))
        sees = meets(place[None, :], own_place[:, None], query_row[None, :], row[:, None], begin, C)
        p = tl.exp2(scores - (lse * 1.4426950408889634)[None, :])
        p = tl.where(sees & is_key[:, None] & is_other[None, :], p, 0.0)
        dp = product(v, tl.trans(d_out), C)
        weights = p
        if C.drops:
            query_keys = token_keys(query_row, of_round, unit, unit_ptr, position_ptr, seed, True, C)
            if C.wraps:  # a key is met in the round of the query
                key_keys = token_keys(
                    row[:, None], of_round[None, :], unit, unit_ptr, position_ptr, seed, False, C
                )
                keeps = kept(query_keys[None, :], key_keys, threshold)
            else:
                keeps = kept(query_keys[None, :], key_keys[:, None], threshold)
            factor = tl.where(keeps, keep_scale, 0.0)
            weights = p * factor
            dp *= factor
        dv += product(weights.to(d_out.dtype), d_out, C)
        dk += product((p * (dp - delta[None, :])).to(q.dtype), q, C)
    dk *= scale

    q = gather(q_ptr, row, q_strides[2], is_own, C)
    d_out = gather(d_out_ptr, row, d_out_strides[2], is_query, C)
    lse = tl.load(lse_ptr + row, mask=is_query, other=float("inf"))
    delta = tl.load(delta_ptr + row, mask=is_query, other=0.0)
    if LAST:  # who met nobody has o = v
        dv += tl.where((is_query & (lse == float("inf")))[:, None], d_out.to(tl.float32), 0.0)
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    if C.drops:
        query_keys = token_keys(row, round_, unit, unit_ptr, position_ptr, seed, True, C)
    start, stop = keys_in_sight(first, begin, end, C)
    for block in range(start, stop, C.block):
        place = block + tl.arange(0, C.block)
        key_row, is_other, _ = rows_at(order_ptr, place, begin, end, round_, seq_len, C)
        k = gather(k_ptr, key_row, k_strides[2], is_other, C)
        v = gather(v_ptr, key_row, v_strides[2], is_other, C)
        scores = product(q, tl.trans(k), C) * score_scale
        if C.counts_once:
            scores -= tl.log2(meetings(codes_ptr, row[:, None], key_row[None, :], seq_len, C))
        sees = meets(own_place[:, None], place[None, :], row[:, None], key_row[None, :], begin, C)
        p = tl.exp2(scores - (lse * 1.4426950408889634)[:, None])
        p = tl.where(sees & is_query[:, None] & is_other[None, :], p, 0.0)
        dp = product(d_out, tl.trans(v), C)
        if C.drops:
            other_keys = token_keys(key_row, round_, unit, unit_ptr, position_ptr, seed, False, C)
            dp = tl.where(kept(query_keys[:, None], other_keys[None, :], threshold), dp * keep_scale, 0.0)
        dq += product((p * (dp - delta[:, None])).to(k.dtype), k, C)
    dq *= scale

    if C.shared:
        wide = q.to(tl.float32)
        norm = tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), 1e-12)
        key = wide / norm[:, None]
        dq += (dk - key * tl.sum(key * dk, 1)[:, None]) / norm[:, None]
    else:
        dk_ptr += batch * dk_strides[0] + head * dk_strides[1]
        add(dk, sum_k_ptr + state * C.head_dim, dk_ptr, dk_strides[2], row, is_own, FIRST, LAST, C)
    dq_ptr += batch * dq_strides[0] + head * dq_strides[1]
    add(dq, sum_q_ptr + state * C.head_dim, dq_ptr, dq_strides[2], row, is_own, FIRST, LAST, C)
    dv_ptr += batch * dv_strides[0] + head * dv_strides[1]
    add(dv, sum_v_ptr + state * C.head_dim, dv_ptr, dv_strides[2], row, is_own, FIRST, LAST, C)


@triton.jit
def add(
    value, sum_ptr, out_ptr, out_stride, row, is_row, FIRST: tl.constexpr, LAST: tl.constexpr, C: tl.constexpr
):
    """Adds to the float32 sums of rows; the LAST time the result goes out instead."""
    if not FIRST:
        value += gather(sum_ptr, row, C.head_dim, is_row, C)
    if LAST:
        scatter(out_ptr, row, out_stride, is_row, value, C)
    else:
        scatter(sum_ptr, row, C.head_dim, is_row, value, C)
