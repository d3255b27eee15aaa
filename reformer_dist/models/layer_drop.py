"""Going around a layer for one step (LayerDrop, arXiv 1909.11556)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def left_out(x1: Tensor, x2: Tensor, untouched: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The streams as they are. What the layer would have used gets gradients of zeros, not none.

    So every rank and ZeRO stage sees the same step: ZeRO's hooks wait for each parameter, and an optimizer that
    passes over parameters without gradients would move them otherwise at some stages than at others.
    """
    y1, y2 = _LeftOut.apply(x1, x2, *(p for p in untouched if p.requires_grad))
    return y1, y2


class _LeftOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.alike = [(p.shape, p.dtype, p.device) for p in parameters]
        return x1.view_as(x1), x2.view_as(x2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.alike)
        return (*grads, *zeros)
