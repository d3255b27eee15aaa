"""Reformer models and their distributed trainer.

Names are imported lazily on first access, so importing the package is cheap; they need torch only. Imported before
torch, the package also limits the spinning of threads (`ops.spinning`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from reformer_dist.ops.spinning import limit_spinning as _limit_spinning

__version__ = "0.1.0"

if TYPE_CHECKING:
    from reformer_dist.config import (
        Activation,
        AttentionBackend,
        AttentionKind,
        CompatConfig,
        CrossAttentionKind,
        HashScheme,
        ModelConfig,
        NeighbourRule,
        Norm,
        Pooling,
        Position,
        Recompute,
        StreamMerge,
    )
    from reformer_dist.inference import load
    from reformer_dist.models import (
        AttentionView,
        Block,
        ExactSelfAttention,
        LocalSelfAttention,
        LSHSelfAttention,
        ReformerEncoderDecoder,
        ReformerForQuestionAnswering,
        ReformerForSequenceClassification,
        ReformerLM,
        ReformerStack,
        init_weights,
        inspect_attention,
    )
    from reformer_dist.ops.lsh import lsh_attention

__all__ = [
    "Activation",
    "AttentionBackend",
    "AttentionKind",
    "AttentionView",
    "Block",
    "CompatConfig",
    "CrossAttentionKind",
    "ExactSelfAttention",
    "HashScheme",
    "LSHSelfAttention",
    "LocalSelfAttention",
    "ModelConfig",
    "NeighbourRule",
    "Norm",
    "Pooling",
    "Position",
    "Recompute",
    "ReformerEncoderDecoder",
    "ReformerForQuestionAnswering",
    "ReformerForSequenceClassification",
    "ReformerLM",
    "ReformerStack",
    "StreamMerge",
    "__version__",
    "init_weights",
    "inspect_attention",
    "load",
    "lsh_attention",
]
_limit_spinning()  # read when PyTorch is loaded
_EXPORTING_MODULES = (
    "reformer_dist.config",
    "reformer_dist.models",
    "reformer_dist.ops.lsh",
    "reformer_dist.inference",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in map(import_module, _EXPORTING_MODULES):
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
