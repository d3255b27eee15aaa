"""What ranks with slices of the same rows must agree on with one process that has the whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reformer_dist.models.base import ReformerModel
from reformer_dist.training.batches import MicroBatch


def check_training(model: ReformerModel, expected: Tensor, batch: MicroBatch, **options: Any) -> None:
    """Loss and gradients are the sums over the ranks of those of their slices.

    expected: the loss of the whole rows, by the same model. options: of the forward of slices.
    """
    expected.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    loss = model(**batch.tensors, **options, **batch.sequences)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-6, atol=0)
    largest = max(grad.norm() for grad in grads)
    for (name, parameter), grad in zip(model.named_parameters(), grads, strict=True):
        dist.all_reduce(parameter.grad)
        assert (parameter.grad - grad).norm() <= 1e-5 * (grad.norm() + 0.1 * largest), name
    model.zero_grad()
