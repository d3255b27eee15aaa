"""Row-wise kernels before and after those of the tiles: rowsum(dO * o), and the sums over rounds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reformer_dist.ops.lsh.triton_kernels.load import grid_of, head_and_rows, head_rows

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
def _row_products(
    a_ptr, b_ptr, out_ptr, a_strides, b_strides, n_heads, seq_len,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = _row_range(seq_len, ROWS, HEAD_DIM, BLOCK_D)
    head = rows.head
    a = tl.load(_addresses(a_ptr, a_strides, head, n_heads, rows), mask=rows.mask, other=0.0)
    b = tl.load(_addresses(b_ptr, b_strides, head, n_heads, rows), mask=rows.mask, other=0.0)
    sums = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    tl.store(out_ptr + head.to(tl.int64) * seq_len + rows.row, sums, mask=rows.is_row)


@triton.jit
def _is_present(present_ptr, round_, rows, seq_len, SHARDED: tl.constexpr):
    """Masks the rows of a round: all, except those that a shard lacks in it."""
    is_row = rows.is_row
    if SHARDED:
        is_row = is_row & (tl.load(present_ptr + round_ * seq_len + rows.row, mask=is_row, other=0) != 0)
    return is_row


@triton.jit(do_not_specialize=["first_head"])
def _merge_rounds(
    o_ptr, round_lse_ptr, out_ptr, lse_ptr, present_ptr, out_strides,
    first_head, n_heads, seq_len, SHARDED: tl.constexpr, N_ROUNDS: tl.constexpr,
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
    o /= total_weight[:, None]
    target = _addresses(out_ptr, out_strides, first_head + head, n_heads, rows)
    tl.store(target, o.to(out_ptr.dtype.element_ty), mask=rows.mask)
    lse = tl.where(has_no_key, float("inf"), largest + tl.log2(total_weight))
    tl.store(lse_ptr + (first_head + head).to(tl.int64) * seq_len + rows.row, lse, mask=rows.is_row)


@triton.jit(do_not_specialize=["first_head"])
def _sum_rounds(
    parts_ptr, lse_ptr, out_ptr, present_ptr, out_strides, first_head, n_heads, seq_len,
    SHARDED: tl.constexpr, IS_DV: tl.constexpr, N_ROUNDS: tl.constexpr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """parts [BH, R, S, D] -> out [B, H, S, D]. IS_DV: added to what out has for a query without keys."""
    rows = _row_range(seq_len, ROWS, HEAD_DIM, BLOCK_D)
    head = rows.head
    start = head.to(tl.int64) * N_ROUNDS * seq_len
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for r in tl.static_range(N_ROUNDS):
        index = start + r * seq_len + rows.row
        is_present = _is_present(present_ptr, r, rows, seq_len, SHARDED)
        mask = rows.mask & is_present[:, None] if SHARDED else rows.mask
        part = tl.load(parts_ptr + index[:, None] * HEAD_DIM + rows.column, mask=mask, other=0.0)
        total += part.to(tl.float32)
    target = _addresses(out_ptr, out_strides, first_head + head, n_heads, rows)
    if IS_DV:
        lse = tl.load(lse_ptr + (first_head + head).to(tl.int64) * seq_len + rows.row, mask=rows.is_row, other=0.0)
        has_no_key = (lse == float("inf"))[:, None]
        total += tl.load(target, mask=rows.mask & has_no_key, other=0.0).to(tl.float32)
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=rows.mask)


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """sum over D of a * b, [B, H, S, D] -> float32 [B, H, S]."""
    out = torch.empty(a.shape[:3], dtype=torch.float32, device=a.device)
    grid = grid_of(a.shape[0] * a.shape[1], a.shape[2], ROWS)
    _row_products[grid](a, b, out, a.stride()[:3], b.stride()[:3], a.shape[1], a.shape[2], **_sizes(a))
    return out


def merge_rounds(
    o: Tensor, round_lse: Tensor, out: Tensor, lse: Tensor, first_head: int, present: Tensor | None
) -> None:
    """Merges R partial softmaxes into out [B, H, S, D] and lse [B, H, S]: 0 and inf for a query without keys.

    o [BH, R, S, D] and round_lse [BH, R, S] are of BH heads from first_head on; logsumexps are in base 2. present:
    `Tiles.present`.
    """
    n_heads, n_rounds, seq_len, _ = o.shape
    _merge_rounds[grid_of(n_heads, seq_len, ROWS)](
        o, round_lse, out, lse, round_lse if present is None else present,
        out.stride()[:3], first_head, out.shape[1], seq_len,
        SHARDED=present is not None,
        N_ROUNDS=n_rounds,
        **_sizes(out),
    )  # fmt: skip


def sum_rounds(
    parts: Tensor, out: Tensor, first_head: int, present: Tensor | None, dv_lse: Tensor | None = None
) -> None:
    """Sums the gradients of R rounds [BH, R, S, D] into out [B, H, S, D], for BH heads from first_head on.

    present: `Tiles.present`. dv_lse: the logsumexp [B, H, S] where out is dv, which keeps what it has for queries
    without keys.
    """
    n_heads, n_rounds, seq_len, _ = parts.shape
    lse = parts if dv_lse is None else dv_lse
    _sum_rounds[grid_of(n_heads, seq_len, ROWS)](
        parts, lse, out, lse if present is None else present,
        out.stride()[:3], first_head, out.shape[1], seq_len,
        SHARDED=present is not None,
        IS_DV=dv_lse is not None,
        N_ROUNDS=n_rounds,
        **_sizes(out),
    )  # fmt: skip


def _sizes(x: Tensor) -> dict[str, int]:
    return {"ROWS": ROWS, "HEAD_DIM": x.shape[3], "BLOCK_D": max(16, triton.next_power_of_2(x.shape[3]))}
