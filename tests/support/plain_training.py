"""Training without DeepSpeed, by the optimizers of PyTorch: what every engine, stage and world is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from reformer_dist.config import OptimConfig
from reformer_dist.engine.groups import Update, freeze, parameter_groups


def plain_optimizers(model: nn.Module, config: OptimConfig) -> list[tuple[torch.optim.Optimizer, float]]:
    """An optimizer of PyTorch for each parameter group, with the group's learning rate as a multiple."""
    beta1, beta2 = config.betas
    found: list[tuple[torch.optim.Optimizer, float]] = []
    for group in parameter_groups(model, config):
        parameters, decay = list(group.parameters.values()), group.weight_decay
        optimizer: torch.optim.Optimizer
        if group.update is Update.adamw:
            optimizer = torch.optim.AdamW(
                parameters, betas=(beta1, beta2), eps=config.eps, weight_decay=decay, fused=True
            )
        elif group.update is Update.muon:
            optimizer = torch.optim.Muon(
                parameters, momentum=config.momentum, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
            )
        else:
            optimizer = torch.optim.Adafactor(parameters, weight_decay=decay, eps=(1e-15, 1e-3))
        found.append((optimizer, group.lr_scale))
    return found


@contextmanager
def products_in_float32() -> Iterator[None]:
    """torch.optim.Muon rounds its matrices to bfloat16; here it does not."""
    with mock.patch.object(torch.Tensor, "bfloat16", lambda tensor: tensor.float().clone()):
        yield


def train_plainly(
    model: nn.Module,
    config: OptimConfig,
    learning_rates: Sequence[float],
    micro_batches: Callable[[int], tuple[float, Iterable[Tensor]]],
    after_step: Callable[[], None] = lambda: None,
) -> tuple[list[float], list[float]]:
    """Losses and norms of a step for each learning rate, of one process.

    micro_batches: given the number of a step, its valid labels and the summed loss of each micro-batch, computed
    as it is asked for.
    """
    freeze(model, config)
    optimizers = plain_optimizers(model, config)
    losses, norms = [], []
    for step, learning_rate in enumerate(learning_rates):
        valid, sums = micro_batches(step)
        total = 0.0
        for loss in sums:
            (loss / valid).backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item())
        with products_in_float32():
            for optimizer, lr_scale in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * lr_scale
                optimizer.step()
        model.zero_grad()
        losses.append(total / valid)
        after_step()
    return losses, norms
