"""Embedding lookup in float32, with its gradient, whatever the dtype of the table."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of table [V, dim] by ids [...], int64: [..., dim] float32, or float64 like the table.

    The gradient of a row is summed over its tokens in float32: a bf16 sum stops growing at 256 times its terms.
    """
    out: Tensor = _Embedding.apply(ids, table)
    return out


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(ids, table).to(torch.promote_types(table.dtype, torch.float32))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ids, table = inputs
        ctx.save_for_backward(ids)
        ctx.n_rows = table.shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        # autograd casts the sum to the table's dtype, or to its `grad_dtype`
        return None, torch.ops.aten.embedding_dense_backward(grads[0], ids, ctx.n_rows, -1, False)
