"""How many weights there are and where, counted on a model that has shapes and no memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from reformer_dist.config import ModelConfig
from reformer_dist.engine.optim import parameter_groups
from reformer_dist.models import ReformerLM
from reformer_dist.models.block import Block


@dataclass(frozen=True)
class BlockCount:
    """Weights of one layer, norms included."""

    attention: int
    feed_forward: int

    @property
    def total(self) -> int:
        return self.attention + self.feed_forward


@dataclass(frozen=True)
class ParameterCount:
    total: int
    embedding: int
    blocks: list[BlockCount]
    """Of each block that exists: with model.share_layers, fewer than layers."""
    above: int
    """Of the last norm and the head, without a table that is the embedding's too."""
    groups: list[list[int]]
    """Elements of each tensor of the optimizer's groups."""

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(max(group) for group in self.groups)


def count_parameters(config: ModelConfig, vocab_size: int) -> ParameterCount:
    """The counts of `ReformerLM(config, vocab_size)`."""
    with torch.device("meta"):
        model = ReformerLM(config, vocab_size)
    blocks = [_count_block(block) for block in model.stack.blocks]
    total, embedding = _count(model), _count(model.embedding)
    groups = [[p.numel() for p in group["params"]] for group in parameter_groups(model, weight_decay=0.0)]
    above = total - embedding - sum(block.total for block in blocks)
    return ParameterCount(total, embedding, blocks, above, groups)


def _count_block(block: nn.Module) -> BlockCount:
    assert isinstance(block, Block)
    attention = _count(block.attention_norm) + _count(block.attention)
    return BlockCount(attention, _count(block) - attention)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
