"""Bucket ids by one kernel: projection and argmax (or cell) are fused, so projections are never stored.

The ids are those of `ops.lsh.hashing.hash_vectors`, ties included: the first of the largest columns, and the
positive half. Projections are float32 sums in another order, so where two columns differ by less than the
rounding, the kernel may choose the other one.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from reformer_dist.ops.lsh.hashing import FLOOR_SPAN, LARGEST_FACTOR, bucket_dtype, bucket_factors
from reformer_dist.ops.lsh.hashing import hash_vectors as torch_hash_vectors
from reformer_dist.ops.lsh.triton_kernels.load import grid_of, head_and_rows
from reformer_dist.ops.lsh.triton_kernels.products import INTERPRETED, WIDENS
from reformer_dist.ops.tensor_cache import cache_tensors

MAX_ROWS, MIN_ROWS = 128, 16  # of a program
MAX_WIDTH = 128  # half of the largest factor; wider kernels take minutes to compile
INTERPRETER_SHARED_MEMORY = 2**17  # bytes assumed for the interpreter, which has none
FLOOR = tl.constexpr(FLOOR_SPAN)


@triton.jit
def _hash(
    x_ptr, x_strides, rotations_ptr, ids_ptr, factors, n_heads, seq_len, n_rounds, n_columns,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
    N_FACTORS: tl.constexpr, N_PARTS: tl.constexpr, ROTATES: tl.constexpr,
):  # fmt: skip
    """x [B, H, S, D], rotations [H, R, N_PARTS, D, columns], ids [B, H, R, S]; WIDTH: half of any factor."""
    head_index, row = head_and_rows(seq_len, ROWS)
    batch, head = (head_index // n_heads).to(tl.int64), (head_index % n_heads).to(tl.int64)
    dim, column = tl.arange(0, BLOCK_D), tl.arange(0, WIDTH)
    x_ptr += batch * x_strides[0] + head * x_strides[1]
    mask = (row < seq_len)[:, None] & (dim < HEAD_DIM)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_strides[2] + dim[None, :], mask=mask, other=0.0)
    if WIDENS or not ROTATES:
        x = x.to(tl.float32)
    if not ROTATES:
        x = x / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)[:, None]
    rotations_ptr += head * n_rounds * N_PARTS * HEAD_DIM * n_columns
    ids_ptr += head_index.to(tl.int64) * n_rounds * seq_len
    for round_ in range(n_rounds):
        bucket = tl.zeros([ROWS], tl.int32)
        radix, start = 1, 0
        for f in tl.static_range(N_FACTORS):
            half = factors[f] // 2
            if ROTATES:
                is_column = (dim < HEAD_DIM)[:, None] & (column < half)[None, :]
                projected = tl.zeros([ROWS, WIDTH], tl.float32)
                for part in tl.static_range(N_PARTS):
                    line = (round_ * N_PARTS + part) * HEAD_DIM + dim
                    offsets = line[:, None] * n_columns + start + column[None, :]
                    columns = tl.load(rotations_ptr + offsets, mask=is_column, other=0.0)
                    if WIDENS:
                        columns = columns.to(tl.float32)
                    projected = tl.dot(x, columns, projected, input_precision="tf32x3")
                size = tl.where((column < half)[None, :], tl.abs(projected), -1.0)
                largest = tl.argmax(size, 1, tie_break_left=True)
                chosen = tl.sum(tl.where(column[None, :] == largest[:, None], projected, 0.0), 1)
                bucket += radix * (largest + tl.where(chosen < 0, half, 0))
                start += half
            else:
                offsets = (round_ * HEAD_DIM + dim) * n_columns + f
                direction = tl.load(rotations_ptr + offsets, mask=dim < HEAD_DIM, other=0.0)
                projected = tl.sum(x * direction[None, :], 1)
                cell = tl.floor(projected / (FLOOR / factors[f])).to(tl.int32) + half
                bucket += radix * tl.minimum(tl.maximum(cell, 0), factors[f] - 1)
            radix *= factors[f]
        target = ids_ptr + round_ * seq_len + row
        tl.store(target, bucket.to(ids_ptr.dtype.element_ty), mask=row < seq_len)


@cache_tensors(maxsize=64)  # as `hashing.draw_rotations`: micro-batches copy them to the device once
def _rotation_parts(rotations: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Rotations on a device as a sum of parts in the vectors' type, [H, R, parts, D, columns].

    Products with half-precision vectors are exact, at the speed of that precision: 3 parts hold all 24 bits.
    """
    rest = rotations.pin_memory() if device.type == "cuda" and not rotations.is_cuda else rotations
    rest = rest.to(device, torch.float32, non_blocking=True)
    parts = []
    for _ in range(1 if dtype == torch.float32 else 3):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    return torch.stack(parts, dim=2)


@functools.cache
def _shared_memory(device: int) -> int:
    """Bytes available to a program on a device, according to Triton."""
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


def _max_rows(x: Tensor, block_d: int, n_columns: int) -> int:
    """Rows of a program whose operands fit in shared memory; 0 if MIN_ROWS do not."""
    available = INTERPRETER_SHARED_MEMORY
    if not INTERPRETED:
        available = _shared_memory(triton.runtime.driver.active.get_current_device())
    # a float32 operand is split into two numbers
    column = block_d * x.element_size() * (2 if x.dtype == torch.float32 else 1)
    rows = MAX_ROWS
    while rows >= MIN_ROWS and column * (rows + n_columns) + 1024 > available:
        rows //= 2
    return rows if rows >= MIN_ROWS else 0


def hash_vectors(
    vectors: Tensor,
    rotations: Tensor,
    n_buckets: int,
    scheme: str,
    *,
    factors: tuple[int, ...] | None = None,
) -> Tensor:
    """`ops.lsh.hashing.hash_vectors` by the kernel, or by itself where the factors are too wide for the kernel.

    The host does not wait for the copy of the rotations.
    """
    x = vectors.detach()
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, n_heads, seq_len, head_dim = x.shape
    n_rounds, n_columns = rotations.shape[1], rotations.shape[3]
    dtype = bucket_dtype(n_buckets)
    if n_buckets == 1:
        return torch.zeros(batch, n_heads, n_rounds, seq_len, dtype=dtype, device=x.device)
    rotates = scheme == "rotation"
    factors = bucket_factors(n_buckets, LARGEST_FACTOR[scheme]) if factors is None else factors
    block_d = max(16, triton.next_power_of_2(head_dim))
    width = max(16, triton.next_power_of_2(max(factors) // 2))
    rows = _max_rows(x, block_d, width * len(factors)) if rotates else MAX_ROWS
    if rows == 0 or (rotates and width > MAX_WIDTH):
        return torch_hash_vectors(vectors, rotations, n_buckets, scheme, factors=factors)
    ids = torch.empty(batch, n_heads, n_rounds, seq_len, dtype=dtype, device=x.device)
    parts = _rotation_parts(rotations, x.device, x.dtype if rotates else torch.float32)
    _hash[grid_of(batch * n_heads, seq_len, rows)](
        x, x.stride()[:3], parts, ids, factors, n_heads, seq_len, n_rounds, n_columns,
        ROWS=rows,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        WIDTH=width,
        N_FACTORS=len(factors),
        N_PARTS=parts.shape[2],
        ROTATES=rotates,
    )  # fmt: skip
    return ids
