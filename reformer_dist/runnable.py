"""What a configuration asks for that this machine can't run: said before anything is built."""

from __future__ import annotations

import torch

from reformer_dist.config import AttentionKind, ModelConfig
from reformer_dist.errors import ConfigError
from reformer_dist.models.layer_rule import LayerRule
from reformer_dist.ops.lsh import ChunkRule
from reformer_dist.ops.lsh.implementation import why_not


def require_attention(config: ModelConfig, device: torch.device) -> None:
    """Raises ConfigError where model.attention_implementation can't run on the device."""
    kinds = set(config.layer_kinds())
    if kinds == {AttentionKind.exact}:
        return
    name = config.attention_implementation.name
    rules = [LayerRule.of(config, kind).rule for kind in kinds - {AttentionKind.exact}]
    chunks = any(isinstance(rule, ChunkRule) for rule in rules)
    reason = why_not(name, device, config.resolved_head_dim, chunks=chunks)
    if reason is not None:
        raise ConfigError(f"model.attention_implementation={name}: {reason}")
