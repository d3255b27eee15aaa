"""Removal of the attention of some layers from a trained model: what they contribute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reformer_dist.config import AttentionKind
from reformer_dist.errors import ConfigError
from reformer_dist.models.base import ReformerModel
from reformer_dist.models.block import Block


def remove_attention(model: ReformerModel, layers: str) -> list[int]:
    """Sets the output of the attention of some layers to 0; returns the numbers of these layers, from 0.

    layers: lsh, local or exact, or numbers of layers separated by commas. Raises ConfigError if there are no such
    layers.
    """
    removed = _find(model, layers)

    def zero(module: torch.nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        layer = arguments[2]  # of Attention.forward(x, context, layer, cache)
        return torch.zeros_like(output) if layer in removed else output

    for block in model.stack.blocks:
        assert isinstance(block, Block)
        block.attention.register_forward_hook(zero)
    return removed


def _find(model: ReformerModel, layers: str) -> list[int]:
    kinds = model.config.layer_kinds()
    actual = ", ".join(f"{layer} {kind.name}" for layer, kind in enumerate(kinds))
    if layers in AttentionKind.__members__:
        found = [layer for layer, kind in enumerate(kinds) if kind is AttentionKind[layers]]
    elif all(number.isdecimal() for number in layers.split(",")):
        found = [int(number) for number in layers.split(",") if int(number) < len(kinds)]
        found = found if len(found) == len(layers.split(",")) else []
    else:
        found = []
    if not found:
        raise ConfigError(f"--without {layers}: must name layers of the model, by kind or number: {actual}")
    return found
