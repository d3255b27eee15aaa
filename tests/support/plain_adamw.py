"""Training without DeepSpeed: what every engine, stage and world is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from reformer_dist.config import OptimConfig
from reformer_dist.engine.optim import build_optimizer


def train_plainly(
    model: nn.Module,
    config: OptimConfig,
    learning_rates: Sequence[float],
    micro_batches: Callable[[int], tuple[float, Iterable[Tensor]]],
) -> tuple[list[float], list[float]]:
    """Losses and norms of a step for each learning rate, of one process.

    micro_batches: given the number of a step, its valid labels and the summed loss of each micro-batch, computed
    as it is asked for.
    """
    optimizer = build_optimizer(model, config)
    losses, norms = [], []
    for step, learning_rate in enumerate(learning_rates):
        valid, sums = micro_batches(step)
        total = 0.0
        for loss in sums:
            (loss / valid).backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / valid)
    return losses, norms
