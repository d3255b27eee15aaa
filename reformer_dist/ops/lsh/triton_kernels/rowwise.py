"""Row-wise kernels before and after those of the tiles: rowsum(dO * o), and the sums over rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reformer_dist.ops.lsh.triton_kernels.load import grid_of, head_and_rows, head_rows
from reformer_dist.ops.lsh.triton_kernels.products import LOG2_E, shared_key_factors

ROWS = 64


class RowRange(NamedTuple):
    """The rows of a program, [ROWS], of one head."""

    head: Any
    row: Any
    is_row: Any
    column: Any
    """[1, D]"""
    mask: Any
    """[ROWS, D]: row and column exist."""


@triton.jit
def _row_range(seq_len, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    head, row = head_and_rows(seq_len, ROWS)
    column = tl.arange(0, BLOCK_D)[None, :]
    return RowRange(head, row, row < seq_len, column, (row < seq_len)[:, None] & (column < HEAD_DIM))


@triton.jit
def _addresses(x_ptr, strides, head, n_heads, rows):
    """Addresses of the rows of a (batch row, head) index in x [B, H, S, D]."""
    x = head_rows(x_ptr, strides, head, n_heads)
    return x.ptr + rows.row.to(tl.int64)[:, None] * x.stride + rows.column


@triton.jit
def _dot_rows(a_ptr, a_strides, b_ptr, b_strides, head, n_heads, rows):
    """Sums over D of a * b, [ROWS], of the rows of a head in [B, H, S, D]."""
    a = tl.load(_addresses(a_ptr, a_strides, head, n_heads, rows), mask=rows.mask, other=0.0)
    b = tl.load(_addresses(b_ptr, b_strides, head, n_heads, rows), mask=rows.mask, other=0.0)
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)


@triton.jit
def _row_products(
    a_ptr, b_ptr, out_ptr, a_strides, b_strides, n_heads, seq_len,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = _row_range(seq_len, ROWS, HEAD_DIM, BLOCK_D)
    head = rows.head
    sums = _dot_rows(a_ptr, a_strides, b_ptr, b_strides, head, n_heads, rows)
    tl.store(out_ptr + head.to(tl.int64) * seq_len + rows.row, sums, mask=rows.is_row)


@triton.jit(do_not_specialize=["first_head"])
def _pack_rows(
    q_ptr, lse_ptr, delta_ptr, d_out_ptr, out_ptr, packed_ptr, q_strides, d_out_strides, out_strides,
    first_head, n_heads, seq_len, scale, SHARED: tl.constexpr, HAS_DELTA: tl.constexpr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = _row_range(seq_len, ROWS, HEAD_DIM, BLOCK_D)
    head = first_head + rows.head
    at = head.to(tl.int64) * seq_len + rows.row
    lse = tl.load(lse_ptr + at, mask=rows.is_row)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + at, mask=rows.is_row)
    else:
        delta = _dot_rows(d_out_ptr, d_out_strides, out_ptr, out_strides, head, n_heads, rows)
    factor = tl.full([ROWS], LOG2_E, tl.float32) * scale
    inverse_square = tl.zeros([ROWS], tl.float32)
    if SHARED:
        q = tl.load(_addresses(q_ptr, q_strides, head, n_heads, rows), mask=rows.mask, other=0.0)
        wide = q.to(tl.float32)
        squares = tl.sum(wide * wide, 1)
        factor = shared_key_factors(squares, q.dtype, scale)
        inverse_square = 1.0 / tl.maximum(squares, 1e-24)
    column = tl.arange(0, 4)[None, :]
    packed = tl.where(
        column < 2,
        tl.where(column == 0, lse[:, None], delta[:, None]),
        tl.where(column == 2, factor[:, None], inverse_square[:, None]),
    )
    target = packed_ptr + (rows.head.to(tl.int64) * seq_len + rows.row)[:, None] * 4 + column
    tl.store(target, packed, mask=rows.is_row[:, None])


@triton.jit
def _is_present(present_ptr, round_, rows, seq_len, SHARDED: tl.constexpr):
    """Masks the rows of a round: all, except those that a shard lacks in it."""
    is_row = rows.is_row
    if SHARDED:
        is_row = is_row & (tl.load(present_ptr + round_ * seq_len + rows.row, mask=is_row, other=0) != 0)
    return is_row


@triton.jit(do_not_specialize=["first_head"])
def _merge_rounds(
    o_ptr, round_lse_ptr, v_ptr, out_ptr, lse_ptr, present_ptr, v_strides, out_strides,
    first_head, n_heads, seq_len, SHARDED: tl.constexpr, ATTENDS_ALONE: tl.constexpr, N_ROUNDS: tl.constexpr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """o [BH, R, S, D], round_lse [BH, R, S] -> out [B, H, S, D], lse [B, H, S]."""
    rows = _row_range(seq_len, ROWS, HEAD_DIM, BLOCK_D)
    head = rows.head
    start = head.to(tl.int64) * N_ROUNDS * seq_len
    largest = tl.full([ROWS], -1e30, tl.float32)
    for r in tl.static_range(N_ROUNDS):
        is_present = _is_present(present_ptr, r, rows, seq_len, SHARDED)
        lse = tl.load(round_lse_ptr + start + r * seq_len + rows.row, mask=is_present, other=float("-inf"))
        largest = tl.maximum(largest, lse)
    total_weight = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for r in tl.static_range(N_ROUNDS):
        index = start + r * seq_len + rows.row
        is_present = _is_present(present_ptr, r, rows, seq_len, SHARDED)
        round_weight = tl.exp2(tl.load(round_lse_ptr + index, mask=is_present, other=float("-inf")) - largest)
        total_weight += round_weight
        mask = rows.mask & is_present[:, None] if SHARDED else rows.mask
        round_o = tl.load(o_ptr + index[:, None] * HEAD_DIM + rows.column, mask=mask, other=0.0)
        o += round_o.to(tl.float32) * round_weight[:, None]
    has_no_key = total_weight == 0.0
    total_weight = tl.where(has_no_key, 1.0, total_weight)
    o *= (1.0 / total_weight)[:, None]
    if ATTENDS_ALONE:
        own_v = _addresses(v_ptr, v_strides, first_head + head, n_heads, rows)
        o += tl.load(own_v, mask=rows.mask & has_no_key[:, None], other=0.0).to(tl.float32)
    target = _addresses(out_ptr, out_strides, first_head + head, n_heads, rows)
    tl.store(target, o.to(out_ptr.dtype.element_ty), mask=rows.mask)
    lse = tl.where(has_no_key, float("inf"), largest + tl.log2(total_weight))
    tl.store(lse_ptr + (first_head + head).to(tl.int64) * seq_len + rows.row, lse, mask=rows.is_row)


@triton.jit
def _sum_output(
    parts_ptr, out_ptr, out_strides, lse_ptr, d_out_ptr, d_out_strides, present_ptr, first_head, n_heads, seq_len,
    rows, SHARDED: tl.constexpr, ATTENDS_ALONE: tl.constexpr, N_ROUNDS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """parts [BH, R, S, D] -> out [B, H, S, D]. ATTENDS_ALONE: out is dv, and dO is added where lse is inf."""
    head = rows.head
    start = head.to(tl.int64) * N_ROUNDS * seq_len
    total = tl.zeros([rows.row.shape[0], BLOCK_D], tl.float32)
    for r in tl.static_range(N_ROUNDS):
        index = start + r * seq_len + rows.row
        is_present = _is_present(present_ptr, r, rows, seq_len, SHARDED)
        mask = rows.mask & is_present[:, None] if SHARDED else rows.mask
        part = tl.load(parts_ptr + index[:, None] * HEAD_DIM + rows.column, mask=mask, other=0.0)
        total += part.to(tl.float32)
    target = _addresses(out_ptr, out_strides, first_head + head, n_heads, rows)
    if ATTENDS_ALONE:
        lse = tl.load(lse_ptr + (first_head + head).to(tl.int64) * seq_len + rows.row, mask=rows.is_row, other=0.0)
        has_no_key = (lse == float("inf"))[:, None]
        own_d_out = _addresses(d_out_ptr, d_out_strides, first_head + head, n_heads, rows)
        total += tl.load(own_d_out, mask=rows.mask & has_no_key, other=0.0).to(tl.float32)
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=rows.mask)


@triton.jit(do_not_specialize=["first_head"])
def _sum_rounds(
    dq_parts_ptr, dv_parts_ptr, dk_parts_ptr, dq_ptr, dv_ptr, dk_ptr, lse_ptr, d_out_ptr, present_ptr,
    dq_strides, dv_strides, dk_strides, d_out_strides, first_head, n_heads, seq_len,
    SHARDED: tl.constexpr, ATTENDS_ALONE: tl.constexpr, N_ROUNDS: tl.constexpr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of q, v or k, by the second dimension of the grid."""
    rows = _row_range(seq_len, ROWS, HEAD_DIM, BLOCK_D)
    if tl.program_id(1) == 0:
        _sum_output(
            dq_parts_ptr, dq_ptr, dq_strides, lse_ptr, d_out_ptr, d_out_strides, present_ptr, first_head, n_heads,
            seq_len, rows, SHARDED, False, N_ROUNDS, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        _sum_output(
            dv_parts_ptr, dv_ptr, dv_strides, lse_ptr, d_out_ptr, d_out_strides, present_ptr, first_head, n_heads,
            seq_len, rows, SHARDED, ATTENDS_ALONE, N_ROUNDS, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    else:
        _sum_output(
            dk_parts_ptr, dk_ptr, dk_strides, lse_ptr, d_out_ptr, d_out_strides, present_ptr, first_head, n_heads,
            seq_len, rows, SHARDED, False, N_ROUNDS, HEAD_DIM, BLOCK_D,
        )  # fmt: skip


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """sum over D of a * b, [B, H, S, D] -> float32 [B, H, S]."""
    out = torch.empty(a.shape[:3], dtype=torch.float32, device=a.device)
    grid = grid_of(a.shape[0] * a.shape[1], a.shape[2], ROWS)
    _row_products[grid](a, b, out, a.stride()[:3], b.stride()[:3], a.shape[1], a.shape[2], **_sizes(a))
    return out


def pack_rows(
    q: Tensor, lse: Tensor, delta: Tensor | None, vectors: tuple[Tensor, Tensor] | None, scale: float,
    first_head: int, n_heads: int, *, shared: bool,
) -> Tensor:  # fmt: skip
    """What the backward needs of a row besides its vectors, float32 [BH, S, 4]: one load of 16 bytes.

    lse and delta [B, H, S], or the sum over D of the product of two vectors [B, H, S, D]; and of rows as keys the
    factors of their scores and 1 / |q|^2, for shared keys. Of n_heads (batch row, head) pairs from first_head on.
    """
    seq_len = q.shape[2]
    packed = torch.empty(n_heads, seq_len, 4, dtype=torch.float32, device=q.device)
    d_out, out = (q, q) if vectors is None else vectors
    _pack_rows[grid_of(n_heads, seq_len, ROWS)](
        q, lse, lse if delta is None else delta, d_out, out, packed,
        q.stride()[:3], d_out.stride()[:3], out.stride()[:3], first_head, q.shape[1], seq_len, scale,
        SHARED=shared,
        HAS_DELTA=delta is not None,
        **_sizes(q),
    )  # fmt: skip
    return packed


def merge_rounds(
    o: Tensor, round_lse: Tensor, v: Tensor, out: Tensor, lse: Tensor, first_head: int, present: Tensor | None,
    *, attends_alone: bool,
) -> None:  # fmt: skip
    """Merges R partial softmaxes into out [B, H, S, D] and lse [B, H, S], which is inf for a query without keys.

    o [BH, R, S, D] and round_lse [BH, R, S] are of BH heads from first_head on; logsumexps are in base 2. present:
    `Tiles.present`. attends_alone: a query without keys gets its v [B, H, S, D], else 0.
    """
    n_heads, n_rounds, seq_len, _ = o.shape
    _merge_rounds[grid_of(n_heads, seq_len, ROWS)](
        o, round_lse, v, out, lse, round_lse if present is None else present,
        v.stride()[:3], out.stride()[:3], first_head, out.shape[1], seq_len,
        SHARDED=present is not None,
        ATTENDS_ALONE=attends_alone,
        N_ROUNDS=n_rounds,
        **_sizes(out),
    )  # fmt: skip


def sum_rounds(
    parts: Sequence[Tensor], outputs: Sequence[Tensor], lse: Tensor, d_out: Tensor, first_head: int,
    present: Tensor | None, *, attends_alone: bool,
) -> None:  # fmt: skip
    """Sums the gradients of R rounds [BH, R, S, D] into dq, dv and perhaps dk [B, H, S, D], for BH heads.

    first_head: of these heads. present: `Tiles.present`. attends_alone: d_out of queries without keys, whose
    logsumexp in lse [B, H, S] is inf, is added to dv.
    """
    n_heads, n_rounds, seq_len, _ = parts[0].shape
    dq, dv, dk = outputs[0], outputs[1], outputs[-1]
    (n_programs,) = grid_of(n_heads, seq_len, ROWS)
    _sum_rounds[(n_programs, len(outputs))](
        parts[0], parts[1], parts[-1], dq, dv, dk, lse, d_out, lse if present is None else present,
        dq.stride()[:3], dv.stride()[:3], dk.stride()[:3], d_out.stride()[:3], first_head, dq.shape[1], seq_len,
        SHARDED=present is not None,
        ATTENDS_ALONE=attends_alone,
        N_ROUNDS=n_rounds,
        **_sizes(dq),
    )  # fmt: skip


def _sizes(x: Tensor) -> dict[str, int]:
    return {"ROWS": ROWS, "HEAD_DIM": x.shape[3], "BLOCK_D": max(16, triton.next_power_of_2(x.shape[3]))}
