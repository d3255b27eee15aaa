"""Models in plain PyTorch."""

from reformer_dist.models.reformer import ReformerLM
from reformer_dist.models.stack import ReformerStack

__all__ = ["ReformerLM", "ReformerStack"]
