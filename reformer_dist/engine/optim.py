"""AdamW with its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from reformer_dist.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups with and without weight decay: only matrices of linear layers decay."""
    undecayed = {
        id(p)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or "positions" in name.split(".")
        for p in module.parameters()
    }
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.dim() >= 2 and id(parameter) not in undecayed
            (decayed if is_matrix else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over the parameter groups; each step sets its learning rate."""
    groups = parameter_groups(model, config.weight_decay)
    beta1, beta2 = config.betas
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=config.eps, fused=True)
