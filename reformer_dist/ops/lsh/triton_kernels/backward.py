"""Backward kernel: one round's gradients of the rows of a tile, as keys and as queries.

With the output and logsumexp of the whole softmax, probabilities are exp(s - lse) and no state of the rounds is
needed. A program pairs the C.block rows of one tile with each other, as keys with the other queries that attend to
them, and as queries with the other keys that they attend to. Every gradient is the sum of one program in a fixed
order: there are no atomics, and two runs agree to the last bit.

With ds the gradient of the scores, a pair's weight in both dk and dq is ds times the key's factor
(`products.score_factors`). What a row needs besides its vectors, `rowwise.pack_rows` has written side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from reformer_dist.ops.lsh.triton_kernels.load import (
    count_key_blocks,
    count_query_blocks,
    gather,
    head_rows,
    key_slots,
    line_of_program,
    load_bounds,
    load_other_rows,
    load_tile,
    query_slots,
    sorted_round,
    store,
)
from reformer_dist.ops.lsh.triton_kernels.pair_mask import (
    Dropout,
    Indices,
    as_column,
    as_line,
    attends,
    count_rounds,
    dropout_factors,
    pair_context,
)
from reformer_dist.ops.lsh.triton_kernels.products import LN_2, product


class HeadInputs(NamedTuple):
    """Inputs of one head: HeadRows, and a pointer to the rows of `rowwise.pack_rows`, float32 [S, 4]."""

    q: Any
    k: Any
    v: Any
    d_out: Any
    packed_ptr: Any


class RowScalars(NamedTuple):
    """Of some rows, [n]: lse (inf masks a row), delta = rowsum(dO * o), and as keys their factor and 1 / |k|^2."""

    lse: Any
    delta: Any
    factor: Any
    inverse_square: Any


class Queries(NamedTuple):
    """Some queries: q and dO [n, D], lse in base 2 (inf masks a row) and delta [n], Indices, round of each."""

    q: Any
    d_out: Any
    lse: Any
    delta: Any
    at: Any
    round_: Any


class Keys(NamedTuple):
    """Some keys: k and v [n, D], factors of their scores [n], Indices."""

    k: Any
    v: Any
    factor: Any
    at: Any


@triton.jit(do_not_specialize=["first_head", "n_tiles", "dropout_seed"])
def attend_round_backward(
    q_ptr, k_ptr, v_ptr, d_out_ptr, packed_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, d_out_strides, dq_strides, dk_strides, dv_strides,
    order_ptr, table_ptr, codes_ptr, token_ids_ptr, documents_ptr, first_head, n_heads, seq_len, n_tiles, scale,
    dropout_seed, dropout_threshold, dropout_factor, C: tl.constexpr,
):  # fmt: skip
    """One round is written to dq, dk, dv [B, H, S, D]; of several, each to those [BH, R, S, D].

    With shared keys (C.shared), dk is carried through q / |q| to q, and dq is the whole gradient of q.
    """
    if C.listed:
        n_listed = tl.load(table_ptr + line_of_program(C) * n_tiles * 4)
        for i in range(tl.program_id(0), n_listed, tl.num_programs(0)):
            tile_backward(
                load_bounds(table_ptr, n_tiles, i + 1, C),
                q_ptr, k_ptr, v_ptr, d_out_ptr, packed_ptr, dq_ptr, dk_ptr, dv_ptr,
                q_strides, k_strides, v_strides, d_out_strides, dq_strides, dk_strides, dv_strides,
                order_ptr, codes_ptr, token_ids_ptr, documents_ptr, first_head, n_heads, seq_len, scale,
                dropout_seed, dropout_threshold, dropout_factor, C,
            )  # fmt: skip
    else:
        bounds = load_bounds(table_ptr, n_tiles, tl.program_id(0), C)
        if bounds.begin < bounds.end:
            tile_backward(
                bounds, q_ptr, k_ptr, v_ptr, d_out_ptr, packed_ptr, dq_ptr, dk_ptr, dv_ptr,
                q_strides, k_strides, v_strides, d_out_strides, dq_strides, dk_strides, dv_strides,
                order_ptr, codes_ptr, token_ids_ptr, documents_ptr, first_head, n_heads, seq_len, scale,
                dropout_seed, dropout_threshold, dropout_factor, C,
            )  # fmt: skip


@triton.jit
def tile_backward(
    bounds, q_ptr, k_ptr, v_ptr, d_out_ptr, packed_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, d_out_strides, dq_strides, dk_strides, dv_strides,
    order_ptr, codes_ptr, token_ids_ptr, documents_ptr, first_head, n_heads, seq_len, scale,
    dropout_seed, dropout_threshold, dropout_factor, C: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile."""
    order = sorted_round(order_ptr, seq_len, C)
    dropout = Dropout(dropout_seed, dropout_threshold, dropout_factor)
    pairs = pair_context(bounds, codes_ptr, codes_ptr, token_ids_ptr, documents_ptr, seq_len, scale, dropout, C)
    head = first_head + tl.program_id(2)
    inputs = head_inputs(
        q_ptr, k_ptr, v_ptr, d_out_ptr, packed_ptr, q_strides, k_strides, v_strides, d_out_strides,
        head, n_heads, seq_len,
    )  # fmt: skip

    tile = load_tile(inputs.q, inputs.k, inputs.v, order, bounds, C)
    scalars = load_scalars(inputs, tile.row, tile.is_row)
    at = Indices(query_slots(tile.slot, tile.is_query, bounds, C), tile.row)
    queries = load_queries(tile.q, inputs, at, tile.is_row, scalars, tile.row * 0 + order.round_, C)
    key_at = Indices(key_slots(tile.slot, tile.is_key, bounds, C), tile.row)
    keys = Keys(tile.k, tile.v, scalars.factor, key_at)
    p, ds = pair_gradients(keys, queries, pairs, True, True, C)
    dv = product(p, queries.d_out, C)
    dk = product(ds, tile.q, C)
    dk, dv = add_other_queries(dk, dv, keys, tile.first, inputs, order, bounds, pairs, C)

    if C.n_rounds == 1 and C.attends_alone:
        has_no_key = (scalars.lse == float("inf"))[:, None]
        dv += tl.where(has_no_key, queries.d_out.to(tl.float32), 0.0)
    store(dv, dv_ptr, dv_strides, tile, first_head, n_heads, seq_len, C)
    if C.shared:
        dq = orthogonal_part(dk, tile.q, scalars.inverse_square)
    else:
        store(dk * LN_2, dk_ptr, dk_strides, tile, first_head, n_heads, seq_len, C)
        dq = tl.zeros(dk.shape, tl.float32)

    dq += product(tl.trans(ds), tile.k, C)
    if not C.is_first:
        dq = add_other_keys(dq, queries, tile.first, inputs, order, bounds, pairs, C)
    store(dq * LN_2, dq_ptr, dq_strides, tile, first_head, n_heads, seq_len, C)


@triton.jit
def head_inputs(
    q_ptr, k_ptr, v_ptr, d_out_ptr, packed_ptr, q_strides, k_strides, v_strides, d_out_strides,
    head, n_heads, seq_len,
):  # fmt: skip
    """HeadInputs of a (batch row, head) index; packed [BH, S, 4] is of the group's heads."""
    return HeadInputs(
        q=head_rows(q_ptr, q_strides, head, n_heads),
        k=head_rows(k_ptr, k_strides, head, n_heads),
        v=head_rows(v_ptr, v_strides, head, n_heads),
        d_out=head_rows(d_out_ptr, d_out_strides, head, n_heads),
        packed_ptr=packed_ptr + tl.program_id(2).to(tl.int64) * seq_len * 4,
    )


@triton.jit
def add_other_queries(dk, dv, keys, first, inputs, order, bounds, pairs, C: tl.constexpr):
    """dk and dv of the tile from slot `first`, with the terms of the queries beside it added."""
    before, n_blocks = count_query_blocks(first, bounds, C)
    for i in range(n_blocks):
        others = load_other_rows(i, before, first, order, bounds.query_begin, bounds.query_end, C)
        q = gather(inputs.q, others.row, others.is_row, C)
        at = Indices(query_slots(others.slot, others.is_row, bounds, C), others.row)
        scalars = load_scalars(inputs, others.row, others.is_row)
        queries = load_queries(q, inputs, at, others.is_row, scalars, others.round_, C)
        p, ds = pair_gradients(keys, queries, pairs, True, False, C)
        dv += product(p, queries.d_out, C)
        dk += product(ds, q, C)
    return dk, dv


@triton.jit
def add_other_keys(dq, queries, first, inputs, order, bounds, pairs, C: tl.constexpr):
    """dq of the tile from slot `first`, with the terms of the keys beside it added."""
    before, n_blocks = count_key_blocks(first, bounds, C)
    for i in range(n_blocks):
        others = load_other_rows(i, before, first, order, bounds.begin, bounds.key_end, C)
        k = gather(inputs.k, others.row, others.is_row, C)
        v = gather(inputs.v, others.row, others.is_row, C)
        factor = load_scalars(inputs, others.row, others.is_row).factor
        keys = Keys(k, v, factor, Indices(key_slots(others.slot, others.is_row, bounds, C), others.row))
        _p, ds = pair_gradients(keys, queries, pairs, False, False, C)
        dq += product(ds, k, C)
    return dq


@triton.jit
def load_scalars(inputs, row, is_row):
    """The RowScalars of rows [n]: one load of 16 bytes each."""
    column = tl.arange(0, 4)[None, :]
    packed = tl.load(inputs.packed_ptr + row.to(tl.int64)[:, None] * 4 + column, mask=is_row[:, None], other=0.0)
    lse = tl.sum(tl.where(column == 0, packed, 0.0), 1)
    delta = tl.sum(tl.where(column == 1, packed, 0.0), 1)
    factor = tl.sum(tl.where(column == 2, packed, 0.0), 1)
    inverse_square = tl.sum(tl.where(column == 3, packed, 0.0), 1)
    return RowScalars(tl.where(is_row, lse, float("inf")), delta, factor, inverse_square)


@triton.jit
def load_queries(q, inputs, at, is_row, scalars, round_, C: tl.constexpr):
    """Queries of rows whose q and RowScalars are loaded."""
    return Queries(q, gather(inputs.d_out, at.row, is_row, C), scalars.lse, scalars.delta, at, round_)


@triton.jit
def pair_gradients(keys, queries, pairs, KEYS_FIRST: tl.constexpr, INSIDE: tl.constexpr, C: tl.constexpr):
    """Probabilities after dropout, and weights of the gradients, in the type of rows.

    Both are [keys, queries] if KEYS_FIRST, else [queries, keys]. INSIDE: see `pair_mask.attends`.
    """
    k, v, q, d_out = keys.k, keys.v, queries.q, queries.d_out
    if KEYS_FIRST:
        factors, key, query = keys.factor[:, None], as_column(keys.at), as_line(queries.at)
        lse, delta, round_ = queries.lse[None, :], queries.delta[None, :], queries.round_[None, :]
        scores, dp = product(k, tl.trans(q), C), product(v, tl.trans(d_out), C)
    else:
        factors, key, query = keys.factor[None, :], as_line(keys.at), as_column(queries.at)
        lse, delta, round_ = queries.lse[:, None], queries.delta[:, None], queries.round_[:, None]
        scores, dp = product(q, tl.trans(k), C), product(d_out, tl.trans(v), C)
    scores *= factors
    if C.counts_once:
        scores -= tl.log2(count_rounds(query, key, pairs, C))
    p = tl.where(attends(query, key, pairs, INSIDE, C), tl.exp2(scores - lse), 0.0)
    dropped = p
    if C.drops:  # drawn in the round of the query, which differs from the tile's where rounds wrap
        kept = dropout_factors(query, key, round_, pairs, C)
        dropped = p * kept
        dp *= kept
    return dropped.to(d_out.dtype), (p * (dp - delta) * factors).to(q.dtype)


@triton.jit
def orthogonal_part(dk, q, inverse_square):
    """The part of dk orthogonal to q: the gradient of q through q / |q|, without the factor 1 / |q|.

    inverse_square: 1 / |q|^2.
    """
    wide = q.to(tl.float32)
    along = tl.sum(dk * wide, 1) * inverse_square
    return dk - wide * along[:, None]
