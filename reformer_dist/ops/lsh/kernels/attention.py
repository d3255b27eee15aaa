"""LSH and local attention of whole sequences by the kernels, forward and backward. The host never waits.

All rounds of a group of units are one launch, and another puts them together. Between forward and backward inputs,
output and lse are kept, and the order: 4 bytes for each token, head and round, and its tiles. Reversible layers
keep none of it, since they run their forward again before each backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reformer_dist.ops.lsh.kernels.launch import Units
from reformer_dist.ops.lsh.kernels.rowwise import row_products
from reformer_dist.ops.lsh.kernels.tiles import tile_units
from reformer_dist.ops.lsh.kernels.tuning import GROUP_TOKENS, tuning_of
from reformer_dist.ops.lsh.order import mark_padding
from reformer_dist.ops.lsh.rules import AttentionOptions

# Units lie along the third dimension of a grid, which is shorter than the first.
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
        out = torch.empty_like(v)
        lse = torch.empty(v.shape[:3], dtype=torch.float32, device=v.device)
        groups = _groups(v, bucket_ids, options, key_padding_mask)
        for units in groups:
            units.attend(q, k, v, out, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.groups = groups
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        d_out = _with_whole_rows(grads[0])
        delta = row_products(d_out, out)
        dq, dv = torch.empty_like(q), torch.empty_like(v)
        dk = None if k is None else torch.empty_like(k)
        for units in ctx.groups:
            units.attend_backward((q, k, v, d_out), lse, delta, (dq, dk, dv))
        return dq, dk, dv, None, None, None


def _with_whole_rows(x: Tensor) -> Tensor:
    """The tensor itself where the numbers of a row lie side by side, wherever the rows lie."""
    return x if x.stride(3) == 1 else x.contiguous()


def _groups(
    v: Tensor, bucket_ids: Tensor, options: AttentionOptions, key_padding_mask: Tensor | None
) -> list[Units]:
    n_rounds, seq_len = bucket_ids.shape[2:]
    has_padding = key_padding_mask is not None
    buckets = mark_padding(bucket_ids, options.n_buckets, key_padding_mask)
    size = min(MOST_UNITS, max(1, GROUP_TOKENS // (n_rounds * seq_len)))
    largest = tuning_of(v.shape[3], v.dtype).block
    return [
        Units(options, tile_units(part, options, largest=largest, has_padding=has_padding), number * size)
        for number, part in enumerate(buckets.split(size))
    ]
