"""Attention of whole sequences on one rank, as one function of autograd, whoever does it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Inputs = tuple[Tensor, Tensor | None, Tensor, Tensor]
"""q, k, v and dO."""
Grads = tuple[Tensor, Tensor | None, Tensor]
"""dq, dk and dv."""


class WholeAttention(Protocol):
    """What an backend does, once it knows bucket ids, options and mask. Tensors are [B, H, S, D].

    k and dk are None for shared query-key attention, whose keys are q / |q|.
    """

    def readable(self, x: Tensor) -> Tensor:
        """x, or a copy whose numbers lie as they have to."""
        ...

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Fills out, v for who meets nobody, and lse [B, H, S], float32, in units of its own."""
        ...

    def attend_backward(self, inputs: Inputs, out: Tensor, lse: Tensor, grads: Grads) -> None:
        """Fills the gradients."""
        ...


def attend_whole(q: Tensor, k: Tensor | None, v: Tensor, attention: WholeAttention) -> Tensor:
    """[B, H, S, D] in v's type."""
    out: Tensor = _Attention.apply(q, k, v, attention)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor | None, v: Tensor, attention: WholeAttention) -> Tensor:
        q, v = attention.readable(q), attention.readable(v)
        k = None if k is None else attention.readable(k)
        out = torch.empty_like(v)
        lse = torch.empty(v.shape[:3], dtype=torch.float32, device=v.device)
        with torch.autocast(v.device.type, enabled=False):
            attention.attend(q, k, v, out, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.attention = attention
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        d_out = ctx.attention.readable(grads[0])
        dq, dv = torch.empty_like(q), torch.empty_like(v)
        dk = None if k is None else torch.empty_like(k)
        with torch.autocast(v.device.type, enabled=False):
            ctx.attention.attend_backward((q, k, v, d_out), out, lse, (dq, dk, dv))
        return dq, dk, dv, None
