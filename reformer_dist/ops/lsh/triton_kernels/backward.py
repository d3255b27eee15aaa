"""Backward: one round's gradients of the rows of a tile, as keys and as queries.

With the output and the logsumexp of the whole softmax, probabilities are exp(s - lse) and no state of rounds is
needed. A program takes the C.block rows of one tile with each other, as keys with the other queries that see them,
and as queries with the other keys that they see. So every gradient is the sum of one program, in one order:
nothing is added atomically, and two runs agree to the last bit.

With `ds` the gradient of scores, a pair's weight in both sums, that of its key and that of its query, is ds times
the key's factor (`pairs.score_factors`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from reformer_dist.ops.lsh.triton_kernels.pairs import (
    LN_2,
    LOG2_E,
    blocks_of_keys,
    blocks_of_queries,
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
def attend_round_backward(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, d_out_strides, dq_strides, dk_strides, dv_strides,
    order_ptr, table_ptr, codes_ptr, who_ptr, first_unit, n_heads, seq_len, n_tiles, scale, draw, C: tl.constexpr,
):  # fmt: skip
    """Of one round it makes dq, dk, dv [B, H, S, D]; of several, those [BH, R, S, D] of each round.

    With shared keys (C.shared) dk is led on to q = |q| k at once, and dq is the gradient of q as a whole.
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
    lse_ptr += (first_unit + unit).to(tl.int64) * seq_len
    delta_ptr += (first_unit + unit).to(tl.int64) * seq_len
    q_ptr = of_unit(q_ptr, q_strides, first_unit + unit, n_heads)
    k_ptr = of_unit(k_ptr, k_strides, first_unit + unit, n_heads)
    v_ptr = of_unit(v_ptr, v_strides, first_unit + unit, n_heads)
    d_out_ptr = of_unit(d_out_ptr, d_out_strides, first_unit + unit, n_heads)

    place = first + tl.arange(0, BLOCK)
    is_row, is_key = place < end, place < key_end
    is_query = queries_among(place, is_row, query_begin, query_end, C)
    row = tl.load(order_ptr + round_ * seq_len + place, mask=is_row, other=0)
    q = gather(q_ptr, row, q_strides[2], is_row, C)
    k = q if C.shared else gather(k_ptr, row, k_strides[2], is_key, C)
    v = gather(v_ptr, row, v_strides[2], is_key, C)
    d_out = gather(d_out_ptr, row, d_out_strides[2], is_row, C)
    lse, delta = of_queries(lse_ptr, delta_ptr, row, is_row)

    first, place = unwrapped(first, round_, seq_len, C), unwrapped(place, round_, seq_len, C)
    keys = (k, v, key_places(place, is_key), row)
    queries = (q, d_out, lse, delta, query_places(place, is_query), row, row * 0 + round_)
    pairs = (begin, codes_ptr, seq_len, who_is_here(who_ptr, unit, C), scale, draw)
    p, ds = of_pairs(keys, queries, pairs, True, C)
    dv = product(p, d_out, C)
    dk = product(ds, q, C)
    rows = (q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr)
    row_strides = (q_strides[2], k_strides[2], v_strides[2], d_out_strides[2])
    of_order = (order_ptr, first, key_end, query_begin, query_end, round_)
    dk, dv = add_other_queries(dk, dv, keys, rows, row_strides, of_order, pairs, C)

    if C.n_rounds == 1:  # who met nobody has o = v
        alone = is_row & (tl.load(lse_ptr + row, mask=is_row, other=0.0) == float("inf"))
        dv += gather(d_out_ptr, row, d_out_strides[2], alone, C).to(tl.float32)
    write(dv, dv_ptr, dv_strides, first_unit, row, is_row, n_heads, seq_len, C)
    if C.shared:
        dq = across(dk, q)
    else:
        write(dk * LN_2, dk_ptr, dk_strides, first_unit, row, is_row, n_heads, seq_len, C)
        dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)

    dq += product(tl.trans(ds), k, C)
    dq = add_other_keys(dq, queries, rows, row_strides, of_order, pairs, C)
    write(dq * LN_2, dq_ptr, dq_strides, first_unit, row, is_row, n_heads, seq_len, C)


@triton.jit
def add_other_queries(dk, dv, keys, rows, row_strides, of_order, pairs, C: tl.constexpr):
    """dk and dv with what queries beside the tile give its keys (k, v, places, rows)."""
    q_ptr, d_out_ptr, lse_ptr, delta_ptr = rows[0], rows[3], rows[4], rows[5]
    order_ptr, first, key_end, query_begin, query_end, round_ = of_order
    begin, seq_len = pairs[0], pairs[2]
    before, others = blocks_of_queries(first, begin, key_end, C)
    for i in range(others):
        place, row, is_row, of_round = other_rows(
            i, before, first, order_ptr, query_begin, query_end, round_, seq_len, C
        )
        q = gather(q_ptr, row, row_strides[0], is_row, C)
        d_out = gather(d_out_ptr, row, row_strides[3], is_row, C)
        lse, delta = of_queries(lse_ptr, delta_ptr, row, is_row)
        queries = (q, d_out, lse, delta, query_places(place, is_row), row, of_round)
        p, ds = of_pairs(keys, queries, pairs, True, C)
        dv += product(p, d_out, C)
        dk += product(ds, q, C)
    return dk, dv


@triton.jit
def add_other_keys(dq, queries, rows, row_strides, of_order, pairs, C: tl.constexpr):
    """dq with what keys beside the tile give its queries (q, dO, lse, delta, places, rows, round of each)."""
    k_ptr, v_ptr = rows[1], rows[2]
    order_ptr, first, key_end, round_ = of_order[0], of_order[1], of_order[2], of_order[5]
    begin, seq_len = pairs[0], pairs[2]
    before, others = blocks_of_keys(first, begin, key_end, C)
    for i in range(others):
        place, row, is_row, _round = other_rows(i, before, first, order_ptr, begin, key_end, round_, seq_len, C)
        k = gather(k_ptr, row, row_strides[1], is_row, C)
        v = gather(v_ptr, row, row_strides[2], is_row, C)
        _p, ds = of_pairs((k, v, key_places(place, is_row), row), queries, pairs, False, C)
        dq += product(ds, k, C)
    return dq


@triton.jit
def of_queries(lse_ptr, delta_ptr, row, is_query):
    """Logsumexp in base 2, and rowsum(dO * o); inf silences rows that are no queries."""
    lse = tl.load(lse_ptr + row, mask=is_query, other=float("inf")) * LOG2_E
    return lse, tl.load(delta_ptr + row, mask=is_query, other=0.0)


@triton.jit
def of_pairs(keys, queries, pairs, KEYS_FIRST: tl.constexpr, C: tl.constexpr):
    """Probabilities after dropout, and weights of the gradients, in the type of rows.

    keys: (k, v, places, rows); queries: (q, dO, lse, delta, places, rows, round of each). The results are
    [keys, queries] if KEYS_FIRST, else [queries, keys].
    """
    k, v, key_place, key_row = keys
    q, d_out, lse, delta, query_place, query_row, of_round = queries
    begin, codes_ptr, seq_len, who, scale, draw = pairs
    factors = score_factors(k, scale, C)
    if KEYS_FIRST:
        factors, key_place, key_row = factors[:, None], key_place[:, None], key_row[:, None]
        lse, delta, of_round = lse[None, :], delta[None, :], of_round[None, :]
        query_place, query_row = query_place[None, :], query_row[None, :]
        scores, dp = product(k, tl.trans(q), C), product(v, tl.trans(d_out), C)
    else:
        factors, key_place, key_row = factors[None, :], key_place[None, :], key_row[None, :]
        lse, delta, of_round = lse[:, None], delta[:, None], of_round[:, None]
        query_place, query_row = query_place[:, None], query_row[:, None]
        scores, dp = product(q, tl.trans(k), C), product(d_out, tl.trans(v), C)
    scores *= factors
    if C.counts_once:
        scores -= tl.log2(meetings(codes_ptr, query_row, key_row, seq_len, C))
    sees = meets(query_place, key_place, query_row, key_row, begin, C)
    p = tl.where(sees, tl.exp2(scores - lse), 0.0)
    dropped = p
    if C.drops:  # in the round of the query, which differs under a wrapping rule
        kept = dropout_factors(query_row, key_row, of_round, who, seq_len, draw, C)
        dropped = p * kept
        dp *= kept
    return dropped.to(d_out.dtype), (p * (dp - delta) * factors).to(q.dtype)


@triton.jit
def across(dk, q):
    """The part of dk across q: what the gradient of q / |q| is to q, but for the factor 1 / |q|."""
    wide = q.to(tl.float32)
    along = tl.sum(dk * wide, 1) / tl.maximum(tl.sum(wide * wide, 1), 1e-24)
    return dk - wide * along[:, None]
