"""Keys of a model that no parameter depends on, and that change between the stages of a run."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from reformer_dist.config import ModelConfig
from reformer_dist.config.stage_values import MODEL_KEYS


def set_staged_keys(model: nn.Module, config: ModelConfig) -> None:
    """Gives `MODEL_KEYS` of all modules the values of `config`; the parameters stay."""
    values = {key: getattr(config, key) for key in MODEL_KEYS}
    for module in model.modules():
        own = getattr(module, "config", None)  # an encoder's differs from that of its decoder
        if isinstance(own, ModelConfig):
            setattr(module, "config", replace(own, **values))  # noqa: B010 (typed as a parameter or module)
