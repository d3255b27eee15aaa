"""Chunked cross entropy that never materializes the logits of a whole sequence (paper, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reformer_dist.ops.checks import TensorChecks, check_integer, check_range
from reformer_dist.ops.first_order import FirstOrderFunction, first_order

IGNORE_INDEX = -100


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int
) -> Tensor:
    """Sum of -log p(label) in nats over labels that are not IGNORE_INDEX: a float32 scalar.

    hidden [N, dim], weight [V, dim], bias [V], labels [N] int64. At most `chunk` rows of logits [chunk, V]
    exist at a time; gradients are computed in forward, so no logits are computed twice.

    Raises ValueError for other shapes, dtypes or devices, and for labels neither in [0, V) nor IGNORE_INDEX.
    On a GPU such labels end the process by an assertion, since the host does not wait for their values.
    """
    labels = _check(hidden, weight, bias, labels, chunk)
    is_valid = labels != IGNORE_INDEX
    if not hidden.is_cuda and not is_valid.all():
        # skips ignored tokens; on a GPU the data-dependent shape would force a synchronization
        hidden, labels = hidden[is_valid], labels[is_valid]
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, chunk)
    return loss


@torch.no_grad()
def token_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int) -> Tensor:
    """-log p(label) in nats of each token, [N] float32, without gradients; 0 where the label is IGNORE_INDEX.

    Shapes, `chunk` and errors are those of `chunked_cross_entropy`.
    """
    labels = _check(hidden, weight, bias, labels, chunk)
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        logits = torch.nn.functional.linear(hidden[rows].to(weight.dtype), weight, bias).float()
        losses[rows] = torch.nn.functional.cross_entropy(
            logits, labels[rows], ignore_index=IGNORE_INDEX, reduction="none"
        )
    return losses


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int) -> Tensor:
    """The labels as int64. Raises ValueError."""
    checks = TensorChecks()
    checks.floats("hidden", hidden, "N dim")
    checks.floats("weight", weight, "V dim", any_dtype=True)
    if bias is not None:
        checks.floats("bias", bias, "V", any_dtype=True)
    checks.integers("labels", labels, "N")
    check_integer("chunk", chunk, least=1)
    labels = labels.long()
    check_range("labels", labels, weight.shape[0], limit="vocab_size", also=IGNORE_INDEX)
    return labels


class _ChunkedCrossEntropy(FirstOrderFunction):
    what = "the chunked loss"
    way_out = "compute the loss from the logits, by calling the model without labels"

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int
    ) -> Tensor:
        wants_grad = any(ctx.needs_input_grad[:3])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if wants_grad else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=hidden.device) if wants_grad else None
        d_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=hidden.device) if wants_grad else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows].to(weight.dtype)
            logits = torch.nn.functional.linear(part, weight, bias).float()
            log_p = logits.log_softmax(-1)
            is_valid = labels[rows] != IGNORE_INDEX
            label = labels[rows].clamp_min(0).unsqueeze(1)
            total -= (log_p.gather(1, label).squeeze(1) * is_valid).sum()
            if d_hidden is not None and d_weight is not None and d_bias is not None:
                d_logits = log_p.exp_().scatter_add_(1, label, -torch.ones_like(label, dtype=torch.float32))
                d_logits.mul_(is_valid.unsqueeze(1))
                d_bias += d_logits.sum(0)
                d_logits = d_logits.to(weight.dtype)
                d_hidden[rows] = d_logits @ weight
                d_weight += d_logits.t() @ part
        ctx.has_bias = bias is not None
        ctx.hidden_dtype = hidden.dtype
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        # autograd casts the float32 sums to the weights' dtype, or to their `grad_dtype`
        return (
            (d_hidden * grads[0]).to(ctx.hidden_dtype),
            d_weight * grads[0],
            d_bias * grads[0] if ctx.has_bias else None,
            None,
            None,
        )
