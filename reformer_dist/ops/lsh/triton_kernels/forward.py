"""Forward kernel: the softmax of one round for the queries of a tile.

A program attends from the C.block rows of one tile to each other, then to the other keys in reach, block by block.
Most buckets are one tile, whose rows are loaded once, all at the same time. A row is a query of one tile per
round, so programs never write to the same address and every sum has a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from reformer_dist.ops.lsh.triton_kernels.load import (
    count_key_blocks,
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
from reformer_dist.ops.lsh.triton_kernels.products import product, score_factors


class RunningSoftmax(NamedTuple):
    """Online softmax of a tile's queries over base-2 scores s."""

    o: Any
    """[queries, D] sum of 2^(s - row_max) v."""
    row_max: Any
    """[queries] largest s."""
    row_sum: Any
    """[queries] sum of 2^(s - row_max)."""


@triton.jit(do_not_specialize=["first_head", "n_tiles", "dropout_seed"])
def attend_round(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_strides, k_strides, v_strides, out_strides,
    order_ptr, table_ptr, codes_ptr, token_ids_ptr, documents_ptr, first_head, n_heads, seq_len, n_tiles, scale,
    dropout_seed, dropout_threshold, dropout_factor, C: tl.constexpr,
):  # fmt: skip
    """q, k, v [B, H, S, D]; order [BH, R, S] and the other tensors of a group of BH heads from first_head on.

    One round is written to out [B, H, S, D] and lse [B, H, S]. Of several, each is written to out [BH, R, S, D]
    and lse [BH, R, S], the latter in base 2 and -inf for a query without keys, for `rowwise.merge_rounds`.
    """
    if C.listed:
        n_listed = tl.load(table_ptr + line_of_program(C) * n_tiles * 4)
        for i in range(tl.program_id(0), n_listed, tl.num_programs(0)):
            attend_tile(
                load_bounds(table_ptr, n_tiles, i + 1, C),
                q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_strides, k_strides, v_strides, out_strides,
                order_ptr, codes_ptr, token_ids_ptr, documents_ptr, first_head, n_heads, seq_len, scale,
                dropout_seed, dropout_threshold, dropout_factor, C,
            )  # fmt: skip
    else:
        bounds = load_bounds(table_ptr, n_tiles, tl.program_id(0), C)
        if bounds.begin < bounds.end:
            attend_tile(
                bounds, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_strides, k_strides, v_strides, out_strides,
                order_ptr, codes_ptr, token_ids_ptr, documents_ptr, first_head, n_heads, seq_len, scale,
                dropout_seed, dropout_threshold, dropout_factor, C,
            )  # fmt: skip


@triton.jit
def attend_tile(
    bounds, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_strides, k_strides, v_strides, out_strides,
    order_ptr, codes_ptr, token_ids_ptr, documents_ptr, first_head, n_heads, seq_len, scale,
    dropout_seed, dropout_threshold, dropout_factor, C: tl.constexpr,
):  # fmt: skip
    """The softmax of one tile."""
    round_, head = tl.program_id(1), tl.program_id(2)
    order = sorted_round(order_ptr, seq_len, C)
    dropout = Dropout(dropout_seed, dropout_threshold, dropout_factor)
    pairs = pair_context(bounds, codes_ptr, codes_ptr, token_ids_ptr, documents_ptr, seq_len, scale, dropout, C)
    q_rows = head_rows(q_ptr, q_strides, first_head + head, n_heads)
    k_rows = head_rows(k_ptr, k_strides, first_head + head, n_heads)
    v_rows = head_rows(v_ptr, v_strides, first_head + head, n_heads)

    tile = load_tile(q_rows, k_rows, v_rows, order, bounds, C)
    queries = Indices(query_slots(tile.slot, tile.is_query, bounds, C), tile.row)
    keys = Indices(key_slots(tile.slot, tile.is_key, bounds, C), tile.row)
    softmax = add_keys(empty_softmax(C), tile.q, queries, tile.k, tile.v, keys, round_, pairs, True, C)
    if not C.is_first:
        before, n_blocks = count_key_blocks(tile.first, bounds, C)
        for i in range(n_blocks):
            others = load_other_rows(i, before, tile.first, order, bounds.begin, bounds.key_end, C)
            k = gather(k_rows, others.row, others.is_row, C)
            v = gather(v_rows, others.row, others.is_row, C)
            other_keys = Indices(key_slots(others.slot, others.is_row, bounds, C), others.row)
            softmax = add_keys(softmax, tile.q, queries, k, v, other_keys, round_, pairs, False, C)
    if C.n_rounds == 1 and C.attends_alone:
        own_v = gather(v_rows, tile.row, tile.is_row & (softmax.row_sum == 0.0), C).to(tl.float32)
        softmax = RunningSoftmax(softmax.o + own_v, softmax.row_max, softmax.row_sum)
    store_softmax(softmax, out_ptr, lse_ptr, out_strides, tile, first_head, n_heads, seq_len, C)


@triton.jit
def empty_softmax(C: tl.constexpr):
    """The RunningSoftmax of C.block queries before any key."""
    BLOCK: tl.constexpr = C.block
    BLOCK_D: tl.constexpr = C.block_d
    o, row_sum = tl.zeros([BLOCK, BLOCK_D], tl.float32), tl.zeros([BLOCK], tl.float32)
    row_max = tl.full([BLOCK], -1e30, tl.float32)  # finite, so that differences of two are 0, not nan
    return RunningSoftmax(o, row_max, row_sum)


@triton.jit
def store_softmax(softmax, out_ptr, lse_ptr, out_strides, tile, first_head, n_heads, seq_len, C: tl.constexpr):
    """Stores the output and logsumexp of a tile's rows in this round."""
    round_, head = tl.program_id(1), tl.program_id(2)
    has_no_key = softmax.row_sum == 0.0
    row_sum = tl.where(has_no_key, 1.0, softmax.row_sum)
    o = softmax.o * (1.0 / row_sum)[:, None]
    lse = tl.where(has_no_key, float("-inf"), softmax.row_max + tl.log2(row_sum))
    if C.n_rounds == 1:
        lse = tl.where(has_no_key, float("inf"), lse)
        lse_ptr += first_head.to(tl.int64) * seq_len
    lse_ptr += (head.to(tl.int64) * C.n_rounds + round_) * seq_len
    tl.store(lse_ptr + tile.row, lse, mask=tile.is_row)
    store(o, out_ptr, out_strides, tile, first_head, n_heads, seq_len, C)


@triton.jit
def add_keys(softmax, q, queries, k, v, keys, round_, pairs, INSIDE: tl.constexpr, C: tl.constexpr):
    """The RunningSoftmax of q [queries, D] after keys k and values v [keys, D]; queries, keys: Indices.

    INSIDE: see `pair_mask.attends`.
    """
    queries, keys = as_column(queries), as_line(keys)
    scores = product(q, tl.trans(k), C) * score_factors(k, pairs.scale, C)[None, :]
    if C.counts_once:
        scores -= tl.log2(count_rounds(queries, keys, pairs, C))
    scores = tl.where(attends(queries, keys, pairs, INSIDE, C), scores, float("-inf"))
    row_max = tl.maximum(softmax.row_max, tl.max(scores, 1))
    p = tl.exp2(scores - row_max[:, None])
    rescale = tl.exp2(softmax.row_max - row_max)
    row_sum = softmax.row_sum * rescale + tl.sum(p, 1)
    if C.drops:
        p *= dropout_factors(queries, keys, round_, pairs, C)
    return RunningSoftmax(softmax.o * rescale[:, None] + product(p.to(v.dtype), v, C), row_max, row_sum)
