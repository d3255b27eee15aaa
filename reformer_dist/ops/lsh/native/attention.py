"""LSH and local attention of whole sequences by the C library, forward and backward, under the window rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reformer_dist.ops.lsh.native.calls import Group, order_rows
from reformer_dist.ops.lsh.order import mark_padding
from reformer_dist.ops.lsh.rules import AttentionOptions

# Rows whose order, and in half precision copies, exist at a time.
GROUP_TOKENS = 2**14


def bucket_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    bucket_ids: Tensor,
    options: AttentionOptions,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """As `ops.lsh.attention.bucket_attention`; the rule is a WindowRule, D a multiple of 16 up to 256."""
    out: Tensor = _NativeAttention.apply(q, k, v, bucket_ids, options, key_padding_mask)
    return out


class _NativeAttention(torch.autograd.Function):
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
        q, v = q.contiguous(), v.contiguous()
        k = None if k is None else k.contiguous()
        out = torch.empty_like(v)
        lse = torch.empty(v.shape[:3], dtype=torch.float32)
        for tokens, group in _groups(bucket_ids, options, key_padding_mask):
            _attend(tokens, group, q, k, v, out, lse)
        ctx.save_for_backward(q, k, v, bucket_ids, out, lse, key_padding_mask)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bucket_ids, out, lse, key_padding_mask = ctx.saved_tensors
        d_out = grads[0].contiguous()
        dq, dv = torch.empty_like(q), torch.empty_like(v)
        dk = None if k is None else torch.empty_like(k)
        for tokens, group in _groups(bucket_ids, ctx.options, key_padding_mask):
            _attend_backward(tokens, group, (q, k, v, d_out), out, lse, (dq, dk, dv))
        return dq, dk, dv, None, None, None


def _attend(
    tokens: slice,
    group: Group,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    o = _target(out, tokens)
    k_rows = None if k is None else _rows(k, tokens)
    group.attend(_rows(q, tokens), k_rows, _rows(v, tokens), o, lse.view(-1)[tokens])
    _write(out, tokens, o)


def _attend_backward(
    tokens: slice,
    group: Group,
    inputs: tuple[Tensor, Tensor | None, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor | None, Tensor],
) -> None:
    q, k, v, d_out = inputs
    k_rows = None if k is None else _rows(k, tokens)
    rows = (_rows(q, tokens), k_rows, _rows(v, tokens), _rows(d_out, tokens))
    found = [None if x is None else _target(x, tokens) for x in grads]
    group.attend_backward(rows, _rows(out, tokens), lse.view(-1)[tokens], found)
    for whole, part in zip(grads, found, strict=True):
        if whole is not None and part is not None:
            _write(whole, tokens, part)


def _groups(
    bucket_ids: Tensor, options: AttentionOptions, key_padding_mask: Tensor | None
) -> Iterator[tuple[slice, Group]]:
    """Consecutive (batch, head) units, and which of the flat rows [B * H * S, D] they are."""
    batch, n_heads, _, seq_len = bucket_ids.shape
    numbers = options.unit_numbers(batch, n_heads, bucket_ids.device)
    buckets = mark_padding(bucket_ids, options.n_buckets, key_padding_mask)
    size = max(1, GROUP_TOKENS // seq_len)
    for first in range(0, buckets.shape[0], size):
        part = buckets[first : first + size]
        tokens = slice(first * seq_len, (first + part.shape[0]) * seq_len)
        yield (
            tokens,
            Group(options, seq_len, numbers[first : first + size], order_rows(part, options.n_buckets, options)),
        )


def _rows(x: Tensor, tokens: slice) -> Tensor:
    """[rows, D] of x [B, H, S, D] in float32: a view where x is that."""
    return x.view(-1, x.shape[-1])[tokens].float()


def _target(x: Tensor, tokens: slice) -> Tensor:
    """Where rows of x may be written in float32: in x, or in a tensor that `_write` copies to it."""
    rows = x.view(-1, x.shape[-1])[tokens]
    return rows if x.dtype == torch.float32 else torch.empty_like(rows, dtype=torch.float32)


def _write(x: Tensor, tokens: slice, rows: Tensor) -> None:
    if x.dtype != torch.float32:
        x.view(-1, x.shape[-1])[tokens] = rows
