"""Passes over rows, before and behind the tiles: rowsum(dO * o), and what the rounds make together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reformer_dist.ops.lsh.triton_kernels.pairs import LN_2, of_unit

ROWS = 64


@triton.jit
def _rows(seq_len, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, whether they are there, columns [1, D], whether row and column are there) of this program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)[None, :]
    return row, row < seq_len, column, (row < seq_len)[:, None] & (column < HEAD_DIM)


@triton.jit
def _places(x_ptr, strides, unit, n_heads, row, column):
    """Of rows in x [B, H, S, D]."""
    return of_unit(x_ptr, strides, unit, n_heads) + row.to(tl.int64)[:, None] * strides[2] + column


@triton.jit
def _row_products(
    a_ptr, b_ptr, out_ptr, a_strides, b_strides, n_heads, seq_len,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(1)
    row, is_row, column, mask = _rows(seq_len, ROWS, HEAD_DIM, BLOCK_D)
    a = tl.load(_places(a_ptr, a_strides, unit, n_heads, row, column), mask=mask, other=0.0)
    b = tl.load(_places(b_ptr, b_strides, unit, n_heads, row, column), mask=mask, other=0.0)
    sums = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    tl.store(out_ptr + unit.to(tl.int64) * seq_len + row, sums, mask=is_row)


@triton.jit
def _are_here(here_ptr, round_, row, is_row, seq_len, HELD: tl.constexpr):
    """Which rows a round has: all, but of those that are held."""
    if HELD:
        is_row = is_row & (tl.load(here_ptr + round_ * seq_len + row, mask=is_row, other=0) != 0)
    return is_row


@triton.jit(do_not_specialize=["first_unit"])
def _merge_rounds(
    o_ptr, part_lse_ptr, v_ptr, out_ptr, lse_ptr, here_ptr, v_strides, out_strides, first_unit, n_heads, seq_len,
    HELD: tl.constexpr, N_ROUNDS: tl.constexpr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """o [BH, R, S, D], part_lse [BH, R, S] in base 2 -> out [B, H, S, D], lse [B, H, S]."""
    unit = tl.program_id(1)
    row, is_row, column, mask = _rows(seq_len, ROWS, HEAD_DIM, BLOCK_D)
    start = unit.to(tl.int64) * N_ROUNDS * seq_len
    top = tl.full([ROWS], -1e30, tl.float32)
    for r in tl.static_range(N_ROUNDS):
        is_here = _are_here(here_ptr, r, row, is_row, seq_len, HELD)
        part = tl.load(part_lse_ptr + start + r * seq_len + row, mask=is_here, other=float("-inf"))
        top = tl.maximum(top, part)
    weight = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for r in tl.static_range(N_ROUNDS):
        of_round = start + r * seq_len + row
        is_here = _are_here(here_ptr, r, row, is_row, seq_len, HELD)
        share = tl.exp2(tl.load(part_lse_ptr + of_round, mask=is_here, other=float("-inf")) - top)
        weight += share
        here_mask = mask & is_here[:, None] if HELD else mask
        part = tl.load(o_ptr + of_round[:, None] * HEAD_DIM + column, mask=here_mask, other=0.0)
        o += part.to(tl.float32) * share[:, None]
    alone = weight == 0.0
    whole = tl.where(alone, 1.0, weight)
    of_v = _places(v_ptr, v_strides, first_unit + unit, n_heads, row, column)
    o = o / whole[:, None] + tl.load(of_v, mask=mask & alone[:, None], other=0.0).to(tl.float32)
    target = _places(out_ptr, out_strides, first_unit + unit, n_heads, row, column)
    tl.store(target, o.to(out_ptr.dtype.element_ty), mask=mask)
    lse = tl.where(alone, float("inf"), (top + tl.log2(whole)) * LN_2)
    tl.store(lse_ptr + (first_unit + unit).to(tl.int64) * seq_len + row, lse, mask=is_row)


@triton.jit(do_not_specialize=["first_unit"])
def _sum_rounds(
    parts_ptr, d_out_ptr, lse_ptr, out_ptr, here_ptr, d_out_strides, out_strides, first_unit, n_heads, seq_len,
    HELD: tl.constexpr, LEADS_BACK: tl.constexpr, N_ROUNDS: tl.constexpr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """parts [BH, R, S, D] -> out [B, H, S, D]. LEADS_BACK: who met nobody has o = v, and so dv = dO."""
    unit = tl.program_id(1)
    row, is_row, column, mask = _rows(seq_len, ROWS, HEAD_DIM, BLOCK_D)
    start = unit.to(tl.int64) * N_ROUNDS * seq_len
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for r in tl.static_range(N_ROUNDS):
        of_round = start + r * seq_len + row
        is_here = _are_here(here_ptr, r, row, is_row, seq_len, HELD)
        here_mask = mask & is_here[:, None] if HELD else mask
        part = tl.load(parts_ptr + of_round[:, None] * HEAD_DIM + column, mask=here_mask, other=0.0)
        total += part.to(tl.float32)
    if LEADS_BACK:
        lse = tl.load(lse_ptr + (first_unit + unit).to(tl.int64) * seq_len + row, mask=is_row, other=0.0)
        of_d_out = _places(d_out_ptr, d_out_strides, first_unit + unit, n_heads, row, column)
        total += tl.load(of_d_out, mask=mask & (lse == float("inf"))[:, None], other=0.0).to(tl.float32)
    target = _places(out_ptr, out_strides, first_unit + unit, n_heads, row, column)
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=mask)


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """sum over D of a * b, [B, H, S, D] -> float32 [B, H, S]."""
    out = torch.empty(a.shape[:3], dtype=torch.float32, device=a.device)
    grid = _grid(a.shape[2], a.shape[0] * a.shape[1])
    _row_products[grid](a, b, out, a.stride()[:3], b.stride()[:3], a.shape[1], a.shape[2], **_sizes(a))
    return out


def merge_rounds(
    o: Tensor, part_lse: Tensor, v: Tensor, out: Tensor, lse: Tensor, first_unit: int, here: Tensor | None
) -> None:
    """One softmax of those of R rounds: into out [B, H, S, D] (v for who met nobody) and lse [B, H, S] (inf).

    o [BH, R, S, D], part_lse [BH, R, S] in base 2: of BH units from the first one on. here: `Tiles.here`.
    """
    n_units, n_rounds, seq_len, _ = o.shape
    _merge_rounds[_grid(seq_len, n_units)](
        o, part_lse, v, out, lse, part_lse if here is None else here,
        v.stride()[:3], out.stride()[:3], first_unit, v.shape[1], seq_len,
        HELD=here is not None,
        N_ROUNDS=n_rounds,
        **_sizes(v),
    )  # fmt: skip


def sum_rounds(
    parts: Tensor,
    out: Tensor,
    first_unit: int,
    here: Tensor | None,
    led_back: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Sums of R rounds' gradients [BH, R, S, D] into out [B, H, S, D], for BH units from the first one on.

    here: `Tiles.here`. led_back = (dO [B, H, S, D], lse [B, H, S]): dO is added for rows that met nobody.
    """
    n_units, n_rounds, seq_len, _ = parts.shape
    d_out, lse = (out, parts) if led_back is None else led_back
    _sum_rounds[_grid(seq_len, n_units)](
        parts, d_out, lse, out, lse if here is None else here,
        d_out.stride()[:3], out.stride()[:3], first_unit, out.shape[1], seq_len,
        HELD=here is not None,
        LEADS_BACK=led_back is not None,
        N_ROUNDS=n_rounds,
        **_sizes(out),
    )  # fmt: skip


def _grid(seq_len: int, n_units: int) -> tuple[int, int]:
    return triton.cdiv(seq_len, ROWS), n_units


def _sizes(x: Tensor) -> dict[str, int]:
    return {"ROWS": ROWS, "HEAD_DIM": x.shape[3], "BLOCK_D": max(16, triton.next_power_of_2(x.shape[3]))}
