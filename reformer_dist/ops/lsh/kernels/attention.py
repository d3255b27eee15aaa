"""LSH and local attention of whole sequences by the kernels, forward and backward. The host never waits.

Rounds go one after another, each a launch over all tiles of a group of units. Between forward and backward the
same is kept as in plain PyTorch: inputs, output, lse and bucket ids; the order is sorted again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reformer_dist.ops.lsh.kernels.launch import Gradients, Softmax, Units
from reformer_dist.ops.lsh.kernels.rowwise import normalised, row_products
from reformer_dist.ops.lsh.kernels.tiles import largest_block, tile_units
from reformer_dist.ops.lsh.order import mark_padding
from reformer_dist.ops.lsh.rules import AttentionOptions

# Tokens whose float32 sums exist at a time.
GROUP_TOKENS = 2**20
# Units lie along the second dimension of a grid, which is shorter than the first.
MOST_UNITS = 2**15


def bucket_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    bucket_ids: Tensor,
    options: AttentionOptions,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """As `ops.lsh.attention.bucket_attention`; q, k and v have one type, D is a multiple of 16 up to 128."""
    out: Tensor = _KernelAttention.apply(q, k, v, bucket_ids, options, key_padding_mask)
    return out


class _KernelAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
        bucket_ids: Tensor,
        options: AttentionOptions,
        key_padding_mask: Tensor | None,
    ) -> Tensor:
        q, v = _with_whole_rows(q), _with_whole_rows(v)
        k = None if k is None else _with_whole_rows(k)
        keys = normalised(q) if k is None else k
        out = torch.empty_like(v)
        lse = torch.empty(v.shape[:3], dtype=torch.float32, device=v.device)
        for units in _groups(v, bucket_ids, options, key_padding_mask):
            softmax = Softmax.empty(units.size if units.n_rounds > 1 else 0, v)
            for round_ in range(units.n_rounds):
                result = (out, lse) if round_ == units.n_rounds - 1 else None
                units.attend(round_, q, keys, v, softmax, is_first=round_ == 0, result=result)
        ctx.save_for_backward(q, k, v, bucket_ids, out, lse, key_padding_mask)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bucket_ids, out, lse, key_padding_mask = ctx.saved_tensors
        d_out = _with_whole_rows(grads[0])
        delta = row_products(d_out, out)
        keys = normalised(q) if k is None else k
        dq, dv = torch.empty_like(q), torch.empty_like(v)
        dk = None if k is None else torch.empty_like(k)
        for units in _groups(v, bucket_ids, ctx.options, key_padding_mask):
            shape = (units.size if units.n_rounds > 1 else 0, *v.shape[2:])
            sums = [torch.empty(shape, dtype=torch.float32, device=v.device) for _ in range(2 if k is None else 3)]
            gradients = Gradients(sums[0], None if k is None else sums[2], sums[1])
            for round_ in range(units.n_rounds):
                result = (dq, dk, dv) if round_ == units.n_rounds - 1 else None
                units.attend_backward(
                    round_, (q, keys, v, d_out), lse, delta, gradients, is_first=round_ == 0, result=result
                )
        return dq, dk, dv, None, None, None


def _with_whole_rows(x: Tensor) -> Tensor:
    """The tensor itself where the numbers of a row lie side by side, wherever the rows lie."""
    return x if x.stride(3) == 1 else x.contiguous()


def _groups(
    v: Tensor, bucket_ids: Tensor, options: AttentionOptions, key_padding_mask: Tensor | None
) -> Iterator[Units]:
    batch, n_heads, _, seq_len = bucket_ids.shape
    numbers = options.unit_numbers(batch, n_heads, bucket_ids.device).to(torch.int32)
    buckets = mark_padding(bucket_ids, options.n_buckets, key_padding_mask)
    size = min(MOST_UNITS, max(1, GROUP_TOKENS // seq_len))
    for first in range(0, buckets.shape[0], size):
        tiles = tile_units(
            buckets[first : first + size],
            options,
            largest=largest_block(v.shape[3], v.dtype),
            has_padding=key_padding_mask is not None,
        )
        yield Units(options, tiles, first, numbers[first : first + size])
