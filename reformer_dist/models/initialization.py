"""Initial weights: a function of the seed and the sizes alone."""

from __future__ import annotations

import torch
from torch import nn

from reformer_dist.config import ModelConfig
from reformer_dist.models.embedding import AxialPositions, LearnedPositions, TokenEmbedding
from reformer_dist.models.head import LanguageModelHead
from reformer_dist.models.stack import ReformerStack
from reformer_dist.seeds import derive_seed

HEAD_STD = 0.02


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Initial weights of all modules of a model, from an explicit generator.

    Linear layers: normal with deviation fan_in**-0.5, those that write to a stream divided by the root of
    the number of writes. Embeddings and positions: deviation 1, which matters (positions at 0.02 stall).
    """
    generator = torch.Generator().manual_seed(derive_seed("weights", seed))
    writes = _writes(model, config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shrink = writes.get(module, 1) ** 0.5
            nn.init.normal_(module.weight, 0.0, module.in_features**-0.5 / shrink, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, AxialPositions):
            for table in module.tables:
                nn.init.normal_(table, 0.0, 1.0, generator)
        elif isinstance(module, LearnedPositions):
            nn.init.normal_(module.table, 0.0, 1.0, generator)
    # last, and the head after the table that it may share
    for module in model.modules():
        if isinstance(module, TokenEmbedding):
            nn.init.normal_(module.tokens.weight, 0.0, 1.0 / module.scale, generator)
    for module in model.modules():
        if isinstance(module, LanguageModelHead):
            if not config.tie_embeddings:
                nn.init.normal_(module.weight, 0.0, HEAD_STD, generator)
            nn.init.zeros_(module.bias)


def _writes(model: nn.Module, config: ModelConfig) -> dict[nn.Module, int]:
    """How often a stream is written to in a forward, by each layer that does."""
    writes = dict.fromkeys(_outputs(model), 2 * config.n_layers)
    for stack in model.modules():
        if isinstance(stack, ReformerStack):
            outputs = _outputs(stack)
            writes.update(dict.fromkeys(outputs, stack.n_layers * len(outputs) // len(stack.blocks)))
    return writes


def _outputs(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("to_out")]
