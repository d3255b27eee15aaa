"""Kernels of keys with buckets of their own: queries and keys are sorted apart.

A tile of queries, or of keys, is paired with a range of slots on the other side, which is looked up in
`tiles.Side`: the forward and dq loop over the keys of a tile of queries, dk and dv over the queries of a tile of
keys. Every sum is that of one program in a fixed order. The blocks of a tile of queries are counted from the first
key in reach of its first query, which depends on the past only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from reformer_dist.ops.lsh.triton_kernels.backward import (
    Keys,
    head_inputs,
    load_queries,
    load_scalars,
    pair_gradients,
)
from reformer_dist.ops.lsh.triton_kernels.forward import add_keys, empty_softmax, store_softmax
from reformer_dist.ops.lsh.triton_kernels.load import (
    gather,
    head_rows,
    key_slots,
    load_bounds,
    query_slots,
    store,
)
from reformer_dist.ops.lsh.triton_kernels.pair_mask import Dropout, Indices, pair_context
from reformer_dist.ops.lsh.triton_kernels.products import LN_2, product, score_factors


class SideTile(NamedTuple):
    """C.block rows of a bucket, as queries or as keys, and the slots on the other side that are in their reach."""

    slot: Any
    row: Any
    is_row: Any
    begin: Any
    end: Any


class SideBlock(NamedTuple):
    """C.other_block rows on the other side of a tile."""

    slot: Any
    row: Any
    is_row: Any


@triton.jit
def side_line(side_ptr, seq_len, C: tl.constexpr):
    """Pointer to this program's slots in the first plane of `tiles.Side.planes`, and the stride of the planes."""
    round_, head = tl.program_id(1), tl.program_id(2)
    line = (head.to(tl.int64) * C.n_rounds + round_) * seq_len
    return side_ptr + line, tl.num_programs(2).to(tl.int64) * C.n_rounds * seq_len


@triton.jit
def load_side_tile(side_ptr, bounds, seq_len, C: tl.constexpr):
    """The SideTile with these TileBounds."""
    line_ptr, plane = side_line(side_ptr, seq_len, C)
    slot = bounds.first + tl.arange(0, C.block)
    is_row = slot < bounds.end
    last = tl.minimum(bounds.first + C.block, bounds.end) - 1
    row = tl.load(line_ptr + slot, mask=is_row, other=0)
    begin, end = tl.load(line_ptr + plane + bounds.first), tl.load(line_ptr + 2 * plane + last)
    return SideTile(slot, row, is_row, begin, end)


@triton.jit
def count_blocks(tile, C: tl.constexpr):
    """Blocks on the other side that are in reach of a SideTile."""
    return tl.cdiv(tl.maximum(tile.end - tile.begin, 0), C.other_block)


@triton.jit
def load_side_block(i, tile, side_ptr, seq_len, C: tl.constexpr):
    """SideBlock number i of those in reach of a SideTile of the other side."""
    line_ptr, _plane = side_line(side_ptr, seq_len, C)
    slot = tile.begin + i * C.other_block + tl.arange(0, C.other_block)
    is_row = slot < tile.end
    return SideBlock(slot, tl.load(line_ptr + slot, mask=is_row, other=0), is_row)


@triton.jit
def query_indices(rows, queries_ptr, bounds, seq_len, C: tl.constexpr):
    """Indices of queries, a SideTile or a SideBlock, at the slots of their last keys."""
    line_ptr, plane = side_line(queries_ptr, seq_len, C)
    last_key = tl.load(line_ptr + 3 * plane + rows.slot, mask=rows.is_row, other=0)
    return Indices(query_slots(last_key, rows.is_row, bounds, C), rows.row)


@triton.jit
def key_indices(rows, bounds, C: tl.constexpr):
    """Indices of keys: a SideTile or a SideBlock."""
    return Indices(key_slots(rows.slot, rows.is_row, bounds, C), rows.row)


@triton.jit(do_not_specialize=["first_head", "n_tiles", "dropout_seed"])
def attend_own_keys(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_strides, k_strides, v_strides, out_strides,
    queries_ptr, keys_ptr, table_ptr, query_codes_ptr, codes_ptr, token_ids_ptr, documents_ptr,
    first_head, n_heads, seq_len, n_tiles, scale, dropout_seed, dropout_threshold, dropout_factor, C: tl.constexpr,
):  # fmt: skip
    """As `forward.attend_round`, for a tile of queries; queries and keys: `tiles.Side.planes`."""
    bounds = load_bounds(table_ptr, n_tiles, tl.program_id(0), C)
    if bounds.begin == bounds.end:
        return
    head = first_head + tl.program_id(2)
    dropout = Dropout(dropout_seed, dropout_threshold, dropout_factor)
    pairs = pair_context(
        bounds, query_codes_ptr, codes_ptr, token_ids_ptr, documents_ptr, seq_len, scale, dropout, C
    )
    k_rows, v_rows = head_rows(k_ptr, k_strides, head, n_heads), head_rows(v_ptr, v_strides, head, n_heads)
    tile = load_side_tile(queries_ptr, bounds, seq_len, C)
    q = gather(head_rows(q_ptr, q_strides, head, n_heads), tile.row, tile.is_row, C)
    queries = query_indices(tile, queries_ptr, bounds, seq_len, C)
    softmax = empty_softmax(C)
    for i in range(count_blocks(tile, C)):
        others = load_side_block(i, tile, keys_ptr, seq_len, C)
        k = gather(k_rows, others.row, others.is_row, C)
        v = gather(v_rows, others.row, others.is_row, C)
        keys = key_indices(others, bounds, C)
        softmax = add_keys(softmax, q, queries, k, v, keys, tl.program_id(1), pairs, False, C)
    store_softmax(softmax, out_ptr, lse_ptr, out_strides, tile, first_head, n_heads, seq_len, C)


@triton.jit(do_not_specialize=["first_head", "n_tiles", "dropout_seed"])
def own_keys_backward_queries(
    q_ptr, k_ptr, v_ptr, d_out_ptr, packed_ptr, dq_ptr,
    q_strides, k_strides, v_strides, d_out_strides, dq_strides,
    queries_ptr, keys_ptr, table_ptr, query_codes_ptr, codes_ptr, token_ids_ptr, documents_ptr,
    first_head, n_heads, seq_len, n_tiles, scale, dropout_seed, dropout_threshold, dropout_factor, C: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries, written as `backward.attend_round_backward` does."""
    bounds = load_bounds(table_ptr, n_tiles, tl.program_id(0), C)
    if bounds.begin == bounds.end:
        return
    head = first_head + tl.program_id(2)
    dropout = Dropout(dropout_seed, dropout_threshold, dropout_factor)
    pairs = pair_context(
        bounds, query_codes_ptr, codes_ptr, token_ids_ptr, documents_ptr, seq_len, scale, dropout, C
    )
    inputs = head_inputs(
        q_ptr, k_ptr, v_ptr, d_out_ptr, packed_ptr, q_strides, k_strides, v_strides, d_out_strides,
        head, n_heads, seq_len,
    )  # fmt: skip
    tile = load_side_tile(queries_ptr, bounds, seq_len, C)
    q = gather(inputs.q, tile.row, tile.is_row, C)
    at = query_indices(tile, queries_ptr, bounds, seq_len, C)
    scalars = load_scalars(inputs, tile.row, tile.is_row)
    queries = load_queries(q, inputs, at, tile.is_row, scalars, tile.row * 0 + tl.program_id(1), C)
    BLOCK: tl.constexpr = C.block
    BLOCK_D: tl.constexpr = C.block_d
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for i in range(count_blocks(tile, C)):
        others = load_side_block(i, tile, keys_ptr, seq_len, C)
        k = gather(inputs.k, others.row, others.is_row, C)
        v = gather(inputs.v, others.row, others.is_row, C)
        factor = score_factors(k, scale, C)
        keys = Keys(k, v, factor, key_indices(others, bounds, C))
        _p, ds = pair_gradients(keys, queries, pairs, False, False, C)
        dq += product(ds, k, C)
    store(dq * LN_2, dq_ptr, dq_strides, tile, first_head, n_heads, seq_len, C)


@triton.jit(do_not_specialize=["first_head", "n_tiles", "dropout_seed"])
def own_keys_backward_keys(
    q_ptr, k_ptr, v_ptr, d_out_ptr, packed_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, d_out_strides, dk_strides, dv_strides,
    queries_ptr, keys_ptr, table_ptr, query_codes_ptr, codes_ptr, token_ids_ptr, documents_ptr,
    first_head, n_heads, seq_len, n_tiles, scale, dropout_seed, dropout_threshold, dropout_factor, C: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, likewise."""
    bounds = load_bounds(table_ptr, n_tiles, tl.program_id(0), C)
    if bounds.begin == bounds.end:
        return
    head = first_head + tl.program_id(2)
    dropout = Dropout(dropout_seed, dropout_threshold, dropout_factor)
    pairs = pair_context(
        bounds, query_codes_ptr, codes_ptr, token_ids_ptr, documents_ptr, seq_len, scale, dropout, C
    )
    inputs = head_inputs(
        q_ptr, k_ptr, v_ptr, d_out_ptr, packed_ptr, q_strides, k_strides, v_strides, d_out_strides,
        head, n_heads, seq_len,
    )  # fmt: skip
    tile = load_side_tile(keys_ptr, bounds, seq_len, C)
    k, v = gather(inputs.k, tile.row, tile.is_row, C), gather(inputs.v, tile.row, tile.is_row, C)
    keys = Keys(k, v, score_factors(k, scale, C), key_indices(tile, bounds, C))
    BLOCK: tl.constexpr = C.block
    BLOCK_D: tl.constexpr = C.block_d
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for i in range(count_blocks(tile, C)):
        others = load_side_block(i, tile, queries_ptr, seq_len, C)
        q = gather(inputs.q, others.row, others.is_row, C)
        at = query_indices(others, queries_ptr, bounds, seq_len, C)
        scalars = load_scalars(inputs, others.row, others.is_row)
        queries = load_queries(q, inputs, at, others.is_row, scalars, others.row * 0 + tl.program_id(1), C)
        p, ds = pair_gradients(keys, queries, pairs, True, False, C)
        dv += product(p, queries.d_out, C)
        dk += product(ds, q, C)
    store(dk * LN_2, dk_ptr, dk_strides, tile, first_head, n_heads, seq_len, C)
    store(dv, dv_ptr, dv_strides, tile, first_head, n_heads, seq_len, C)
