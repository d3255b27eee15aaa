"""The stack of layers, and the three ways in which backward obtains their activations."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Unpack

from reformer_dist.config import ModelConfig, Recompute
from reformer_dist.models.block import Block
from reformer_dist.models.context import (
    ForwardContext,
    ForwardOptions,
    RecomputeCache,
    build_context,
    call_options,
    refuse_options,
)
from reformer_dist.models.embedding import build_positions, check_length
from reformer_dist.models.inputs import check_vectors
from reformer_dist.models.norms import build_final_norm
from reformer_dist.models.reversible import Streams, Tape
from reformer_dist.models.training_steps import CountsSteps, draws_rotations
from reformer_dist.ops.checks import check_type


class ReformerStack(CountsSteps):
    """[B, S, dim] -> [B, S, output_dim]: both streams start as the input; their merged outputs are normalized.

    They are merged by their mean or, with compat.merge_streams=concat, by concatenation. With has_cross_attention,
    every layer also attends to the source of its context. A standalone stack adds the positions of its config to
    its input. In a model, whose embedding has them, has_positions is false.
    """

    def __init__(
        self, config: ModelConfig, *, has_cross_attention: bool = False, has_positions: bool = True
    ) -> None:
        super().__init__()
        check_type("config", config, ModelConfig)
        check_type("has_cross_attention", has_cross_attention, bool)
        self.config, self.recompute = config, config.recompute
        kinds = config.layer_kinds()[: config.n_blocks]
        self.blocks = nn.ModuleList(Block(config, kind, has_cross_attention=has_cross_attention) for kind in kinds)
        # of width dim: the projection from embedding_dim is a part of the embedding
        self.positions = build_positions(replace(config, embedding_dim=None)) if has_positions else None
        if self.positions is not None:
            for table in self.positions.parameters():
                nn.init.normal_(table)
        self._draws_rotations = draws_rotations(config, kinds, has_cross_attention=has_cross_attention)
        self.n_layers = config.n_layers
        self.is_concat = config.is_concat
        self.norm = build_final_norm(config)

    def forward(
        self, x: Tensor, context: ForwardContext | None = None, **options: Unpack[ForwardOptions]
    ) -> Tensor:
        """`context` is that of the model's forward call; a standalone stack takes `ForwardOptions` instead."""
        if context is not None:
            refuse_options(options)
        else:
            options = call_options(self, options, draws_rotations=self._draws_rotations)
            check_vectors(x, self.config.dim, options)
            check_length(self.config, x.shape[1])
            n_tokens, is_training = x.shape[1], self.training
            context = build_context(self.config, 0, n_tokens, x.device, options, is_training=is_training)
            if self.positions is not None:
                x = x.float() + self.positions(context.positions)
        x = x.float()
        if torch.is_grad_enabled() and not x.requires_grad:
            # with a frozen embedding the layers must still train, and ZeRO's hooks need an input with a gradient
            x = x.detach().requires_grad_()
        y1, y2 = self._run((x, x), context)
        return self.norm(torch.cat([y1, y2], dim=-1) if self.is_concat else (y1 + y2) / 2)

    def _block(self, layer: int) -> Block:
        block = self.blocks[layer % len(self.blocks)]
        assert isinstance(block, Block)
        return block

    def _run(self, streams: Streams, context: ForwardContext) -> Streams:
        needs_grad = torch.is_grad_enabled()
        tape = Tape() if needs_grad and self.recompute is Recompute.reversible else None
        for layer in range(self.n_layers):
            block = self._block(layer)
            if needs_grad and self.recompute is Recompute.checkpoint:
                streams = checkpoint(block, *streams, context, layer, cache=RecomputeCache(), use_reentrant=False)
            else:
                streams = block(*streams, context, layer, tape=tape)
        return streams

    @torch.no_grad()
    def reversible_drift(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Largest difference between the stack's input and its reconstruction from the output: a scalar.

        This is the rounding error of the reversible backward at the lowest layer, where it is largest.
        """
        x = x.float()
        streams, caches = (x, x), [RecomputeCache() for _ in range(self.n_layers)]
        for layer in range(self.n_layers):
            streams = self._block(layer)(*streams, context, layer, cache=caches[layer])
        for layer in reversed(range(self.n_layers)):
            streams = self._block(layer)(*streams, context, layer, cache=caches[layer], is_inverse=True)
        return torch.stack([(stream - x).abs().max() for stream in streams]).max()
