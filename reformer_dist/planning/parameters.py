"""How many weights there are and where, counted on a model that has shapes and no memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from reformer_dist.engine.optim import parameter_groups
from reformer_dist.models import ReformerEncoderDecoder
from reformer_dist.models.base import ReformerModel
from reformer_dist.models.block import Block


@dataclass(frozen=True)
class BlockCount:
    """Weights of one layer, norms included."""

    attention: int
    feed_forward: int
    cross_attention: int = 0

    @property
    def total(self) -> int:
        return self.attention + self.cross_attention + self.feed_forward


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
    encoder_blocks: list[BlockCount]
    """Of an encoder-decoder's other stack; its last norm is `above_encoder`."""
    above_encoder: int

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(max(group) for group in self.groups)


def count_parameters(build_model: Callable[[], nn.Module]) -> ParameterCount:
    """The counts of a model of ours, which is built without memory."""
    with torch.device("meta"):
        model = build_model()
    assert isinstance(model, ReformerModel)
    encoder = model.encoder if isinstance(model, ReformerEncoderDecoder) else None
    blocks = [_count_block(block) for block in model.stack.blocks]
    encoder_blocks = [_count_block(block) for block in encoder.blocks] if encoder else []
    above_encoder = _count(encoder.norm) if encoder else 0
    total, embedding = _count(model), _count(model.embedding)
    groups = [[p.numel() for p in group["params"]] for group in parameter_groups(model, weight_decay=0.0)]
    above = total - embedding - above_encoder - sum(block.total for block in blocks + encoder_blocks)
    return ParameterCount(total, embedding, blocks, above, groups, encoder_blocks, above_encoder)


def _count_block(block: nn.Module) -> BlockCount:
    assert isinstance(block, Block)
    attention = _count(block.attention_norm) + _count(block.attention)
    cross = _count(block.cross_attention_norm) + _count(block.cross_attention) if block.has_cross_attention else 0
    return BlockCount(attention, _count(block) - attention - cross, cross)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
