"""The optimizer of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reformer_dist.config import OptimConfig, OptimizerKind
from reformer_dist.engine.groups import Group
from reformer_dist.engine.matrix_optimizer import MatrixOptimizer


def build_optimizer(
    groups: Sequence[Group], config: OptimConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The optimizer of the parameter groups; each step sets their learning rates. dtype: of Muon's products."""
    if config.kind is not OptimizerKind.adamw:
        return MatrixOptimizer(groups, config, dtype)
    beta1, beta2 = config.betas
    torch_groups = [group.to_torch() for group in groups]
    return torch.optim.AdamW(torch_groups, lr=0.0, betas=(beta1, beta2), eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of each group. lr: of parameters without one of their own."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
