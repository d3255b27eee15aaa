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
    dropout_factors,
    gather,
    keys_in_sight,
    masked,
    of_unit,
    product,
    queries_in_sight,
    rows_at,
    scatter,
    unwrapped,
)


@triton.jit(do_not_specialize=["first_unit", "round_", "n_tiles"])
def attend_round_backward(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr,
    dq_ptr, dk_ptr, dv_ptr, sum_q_ptr, sum_k_ptr, sum_v_ptr,
    q_strides, k_strides, v_strides, d_out_strides, dq_strides, dk_strides, dv_strides,
    order_ptr, table_ptr, codes_ptr, numbers_ptr,
    first_unit, n_heads, seq_len, n_tiles, round_, scale, score_scale, draw,
    FIRST: tl.constexpr, LAST: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sums of dq, dk, dv [U, S, D] float32 get what this round adds; the LAST time the result goes to dq, dk, dv.

    With shared keys (C.shared) dk is led on to q = |q| k at once, and dq is the gradient of q as a whole.
    """
    BLOCK: tl.constexpr = C.block
    unit = tl.program_id(1)
    table_ptr += ((unit * C.n_rounds + round_) * n_tiles + tl.program_id(0)) * 5
    query_begin, query_end = tl.load(table_ptr + 3), tl.load(table_ptr + 4)
    first, begin, end = tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2)
    if (query_begin == query_end) & (begin == end):
        return
    start_row = unit.to(tl.int64) * seq_len
    order_ptr += start_row * C.n_rounds
    codes_ptr += start_row * C.n_rounds
    lse_ptr += first_unit.to(tl.int64) * seq_len + start_row
    delta_ptr += first_unit.to(tl.int64) * seq_len + start_row
    q_ptr = of_unit(q_ptr, q_strides, first_unit + unit, n_heads)
    k_ptr = of_unit(k_ptr, k_strides, first_unit + unit, n_heads)
    v_ptr = of_unit(v_ptr, v_strides, first_unit + unit, n_heads)
    d_out_ptr = of_unit(d_out_ptr, d_out_strides, first_unit + unit, n_heads)
    rows = (q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr)
    row_strides = (q_strides[2], k_strides[2], v_strides[2], d_out_strides[2])

    place = first + tl.arange(0, BLOCK)
    is_key = (place >= begin) & (place < end)
    is_query = (place >= query_begin) & (place < query_end)
    row = tl.load(order_ptr + round_ * seq_len + place, mask=is_key | is_query, other=0)
    first, place = unwrapped(first, round_, seq_len, C), unwrapped(place, round_, seq_len, C)
    of_order = (order_ptr, codes_ptr, seq_len, begin, end, query_begin, query_end, round_, unit)
    dk, dv = of_keys(rows, row_strides, of_order, first, place, row, is_key, score_scale, numbers_ptr, draw, C)
    dq = of_queries(rows, row_strides, of_order, first, place, row, is_query, score_scale, numbers_ptr, draw, C)
    dk, dq = dk * scale, dq * scale

    is_row = is_key | is_query
    if LAST:  # who met nobody has o = v
        alone = is_query & (tl.load(lse_ptr + row, mask=is_query, other=0.0) == float("inf"))
        dv += gather(d_out_ptr, row, d_out_strides[2], alone, C).to(tl.float32)
    if C.shared:
        q = gather(q_ptr, row, q_strides[2], is_row, C).to(tl.float32)
        norm = tl.maximum(tl.sqrt(tl.sum(q * q, 1)), 1e-12)[:, None]
        key = q / norm
        dq += (dk - key * tl.sum(key * dk, 1)[:, None]) / norm
    else:
        dk_ptr = of_unit(dk_ptr, dk_strides, first_unit + unit, n_heads)
        add(dk, sum_k_ptr + start_row * C.head_dim, dk_ptr, dk_strides[2], row, is_row, FIRST, LAST, C)
    dq_ptr = of_unit(dq_ptr, dq_strides, first_unit + unit, n_heads)
    add(dq, sum_q_ptr + start_row * C.head_dim, dq_ptr, dq_strides[2], row, is_row, FIRST, LAST, C)
    dv_ptr = of_unit(dv_ptr, dv_strides, first_unit + unit, n_heads)
    add(dv, sum_v_ptr + start_row * C.head_dim, dv_ptr, dv_strides[2], row, is_row, FIRST, LAST, C)


@triton.jit
def of_keys(
    rows, row_strides, of_order, first, place, row, is_key, score_scale, numbers_ptr, draw, C: tl.constexpr
):
    """dk / scale and dv of a tile's rows, from the queries that see them. Blocks are [keys, queries]."""
    BLOCK: tl.constexpr = C.block
    BLOCK_D: tl.constexpr = C.block_d
    order_ptr, codes_ptr, seq_len, begin = of_order[0], of_order[1], of_order[2], of_order[3]
    query_begin, query_end, round_, unit = of_order[5], of_order[6], of_order[7], of_order[8]
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr = rows
    k = gather(k_ptr, row, row_strides[1], is_key, C)
    v = gather(v_ptr, row, row_strides[2], is_key, C)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    start, stop = queries_in_sight(first, begin, query_begin, query_end, C)
    for block in range(start, stop, BLOCK):
        query_place = block + tl.arange(0, BLOCK)
        query_row, is_query, of_round = rows_at(order_ptr, query_place, query_begin, query_end, round_, seq_len, C)
        q = gather(q_ptr, query_row, row_strides[0], is_query, C)
        d_out = gather(d_out_ptr, query_row, row_strides[3], is_query, C)
        lse = tl.load(lse_ptr + query_row, mask=is_query, other=float("inf")) * 1.4426950408889634
        delta = tl.load(delta_ptr + query_row, mask=is_query, other=0.0)
        scores = masked(
            product(k, tl.trans(q), C) * score_scale, query_place[None, :], place[:, None], query_row[None, :],
            row[:, None], is_query[None, :], is_key[:, None], begin, codes_ptr, seq_len, C,
        )  # fmt: skip
        p = tl.exp2(scores - lse[None, :])
        dp = product(v, tl.trans(d_out), C)
        weights = p
        if C.drops:  # in the round of the query, which differs under a wrapping rule
            factors = dropout_factors(query_row[None, :], row[:, None], of_round[None, :], unit, numbers_ptr, draw)
            weights = p * factors
            dp *= factors
        dv += product(weights.to(d_out.dtype), d_out, C)
        dk += product((p * (dp - delta[None, :])).to(q.dtype), q, C)
    return dk, dv


@triton.jit
def of_queries(
    rows, row_strides, of_order, first, place, row, is_query, score_scale, numbers_ptr, draw, C: tl.constexpr
):
    """dq / scale of a tile's rows, from the keys that they see. Blocks are [queries, keys]."""
    BLOCK: tl.constexpr = C.block
    BLOCK_D: tl.constexpr = C.block_d
    order_ptr, codes_ptr, seq_len, begin, end = of_order[0], of_order[1], of_order[2], of_order[3], of_order[4]
    round_, unit = of_order[7], of_order[8]
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr = rows
    q = gather(q_ptr, row, row_strides[0], is_query, C)
    d_out = gather(d_out_ptr, row, row_strides[3], is_query, C)
    lse = tl.load(lse_ptr + row, mask=is_query, other=float("inf")) * 1.4426950408889634
    delta = tl.load(delta_ptr + row, mask=is_query, other=0.0)
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    start, stop = keys_in_sight(first, begin, end, C)
    for block in range(start, stop, BLOCK):
        key_place = block + tl.arange(0, BLOCK)
        key_row, is_key, _ = rows_at(order_ptr, key_place, begin, end, round_, seq_len, C)
        k = gather(k_ptr, key_row, row_strides[1], is_key, C)
        v = gather(v_ptr, key_row, row_strides[2], is_key, C)
        scores = masked(
            product(q, tl.trans(k), C) * score_scale, place[:, None], key_place[None, :], row[:, None],
            key_row[None, :], is_query[:, None], is_key[None, :], begin, codes_ptr, seq_len, C,
        )  # fmt: skip
        p = tl.exp2(scores - lse[:, None])
        dp = product(d_out, tl.trans(v), C)
        if C.drops:
            dp *= dropout_factors(row[:, None], key_row[None, :], round_, unit, numbers_ptr, draw)
        dq += product((p * (dp - delta[:, None])).to(k.dtype), k, C)
    return dq


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
