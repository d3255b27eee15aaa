"""Weight initialization, a function of the seed and the sizes only."""

from __future__ import annotations

import torch
from torch import nn

from reformer_dist.config import ModelConfig
from reformer_dist.models.embedding import AxialPositions, LearnedPositions, TokenEmbedding
from reformer_dist.models.head import LanguageModelHead
from reformer_dist.models.short_conv import ShortConv
from reformer_dist.models.stack import ReformerStack
from reformer_dist.ops.checks import check_integer, check_type
from reformer_dist.seeds import derive_seed

HEAD_STD = 0.02


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Initializes all modules of a model in place, from a generator seeded with `seed`.

    Linear layers: normal with standard deviation fan_in**-0.5; output projections of sublayers are divided by the
    square root of the number of residual writes. Embeddings and positions: 1, since positions at 0.02 stall. Short
    convolutions: the identity.
    """
    check_type("model", model, nn.Module)
    check_type("config", config, ModelConfig)
    check_integer("seed", seed)
    generator = torch.Generator("cpu").manual_seed(derive_seed("weights", seed))
    n_writes = _residual_writes(model, config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            divisor = n_writes.get(module, 1) ** 0.5
            nn.init.normal_(module.weight, 0.0, module.in_features**-0.5 / divisor, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ShortConv):
            module.reset_parameters()
        elif isinstance(module, AxialPositions):
            for table in module.tables:
                nn.init.normal_(table, 0.0, 1.0, generator)
        elif isinstance(module, LearnedPositions):
            nn.init.normal_(module.table, 0.0, 1.0, generator)
    # last, and the head after the table that may be tied to it
    for module in model.modules():
        if isinstance(module, TokenEmbedding):
            nn.init.normal_(module.tokens.weight, 0.0, 1.0 / module.scale, generator)
    for module in model.modules():
        if isinstance(module, LanguageModelHead):
            if not config.tie_embeddings:
                nn.init.normal_(module.weight, 0.0, HEAD_STD, generator)
            nn.init.zeros_(module.bias)


def _residual_writes(model: nn.Module, config: ModelConfig) -> dict[nn.Module, int]:
    """For each output projection, the number of residual writes per forward in its stack."""
    n_writes = dict.fromkeys(_output_projections(model), 2 * config.n_layers)
    for stack in model.modules():
        if isinstance(stack, ReformerStack):
            projections = _output_projections(stack)
            n_writes.update(dict.fromkeys(projections, stack.n_layers * len(projections) // len(stack.blocks)))
    return n_writes


def _output_projections(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("to_out")]
