"""What a configuration asks for that this machine can't run: said before anything is built."""

from __future__ import annotations

import torch

from reformer_dist.config import AttentionKind, ModelConfig, NeighbourRule
from reformer_dist.errors import ConfigError
from reformer_dist.ops.lsh.implementation import why_not


def require_attention(config: ModelConfig, device: torch.device) -> None:
    """Raises ConfigError where model.attention_implementation can't run on the device."""
    kinds = set(config.layer_kinds())
    if kinds == {AttentionKind.exact}:
        return
    name = config.attention_implementation.name
    has_lsh_chunks = AttentionKind.lsh in kinds and config.neighbours is NeighbourRule.chunk
    chunks = has_lsh_chunks or (AttentionKind.local in kinds and config.local_chunk_len > 0)
    reason = why_not(name, device, config.resolved_head_dim, chunks=chunks)
    if reason is not None:
        raise ConfigError(f"model.attention_implementation={name}: {reason}")
