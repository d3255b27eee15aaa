"""One pass over rows, before the tiles: keys of shared query-key attention, and rowsum(dO * o)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64


@triton.jit
def _places(strides, unit, n_heads, row, is_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    start = (unit // n_heads).to(tl.int64) * strides[0] + (unit % n_heads).to(tl.int64) * strides[1]
    places = start + row.to(tl.int64)[:, None] * strides[2] + column[None, :]
    return places, is_row[:, None] & (column < HEAD_DIM)[None, :]


@triton.jit
def _load(x_ptr, strides, unit, n_heads, row, is_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    at, mask = _places(strides, unit, n_heads, row, is_row, HEAD_DIM, BLOCK_D)
    return tl.load(x_ptr + at, mask=mask, other=0.0)


@triton.jit
def _normalise(
    q_ptr, k_ptr, q_strides, k_strides, n_heads, seq_len,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q = _load(q_ptr, q_strides, unit, n_heads, row, row < seq_len, HEAD_DIM, BLOCK_D)
    wide = q.to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), 1e-12)
    at, mask = _places(k_strides, unit, n_heads, row, row < seq_len, HEAD_DIM, BLOCK_D)
    tl.store(k_ptr + at, (wide / norm[:, None]).to(q.dtype), mask=mask)


@triton.jit
def _row_sums(
    a_ptr, b_ptr, out_ptr, a_strides, b_strides, n_heads, seq_len,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    a = _load(a_ptr, a_strides, unit, n_heads, row, row < seq_len, HEAD_DIM, BLOCK_D)
    b = _load(b_ptr, b_strides, unit, n_heads, row, row < seq_len, HEAD_DIM, BLOCK_D)
    sums = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    tl.store(out_ptr + unit.to(tl.int64) * seq_len + row, sums, mask=row < seq_len)


def normalised(q: Tensor) -> Tensor:
    """q / |q| of [B, H, S, D], in its type; the norm is float32 (as `ops.lsh.shared_keys`)."""
    k = torch.empty_like(q)
    _normalise[_grid(q)](q, k, q.stride()[:3], k.stride()[:3], q.shape[1], q.shape[2], **_sizes(q))
    return k


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """sum over D of a * b, [B, H, S, D] -> float32 [B, H, S]."""
    out = torch.empty(a.shape[:3], dtype=torch.float32, device=a.device)
    _row_sums[_grid(a)](a, b, out, a.stride()[:3], b.stride()[:3], a.shape[1], a.shape[2], **_sizes(a))
    return out


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[2], ROWS), x.shape[0] * x.shape[1]


def _sizes(x: Tensor) -> dict[str, int]:
    return {"ROWS": ROWS, "HEAD_DIM": x.shape[3], "BLOCK_D": max(16, triton.next_power_of_2(x.shape[3]))}
