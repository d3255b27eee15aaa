"""Feed-forward layer. It is token-wise, so a caller may run it on chunks of tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from reformer_dist.config import Activation, ModelConfig
from reformer_dist.models.context import ForwardContext
from reformer_dist.ops.dropout import TokenCoords, token_dropout


class FeedForward(nn.Module):
    """Linear, activation, linear. `glu` gates with GELU (GEGLU, arXiv 2002.05202) at the same inner width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.resolved_ff_dim
        is_gated = config.activation is Activation.glu
        self.to_inner = nn.Linear(config.dim, 2 * inner if is_gated else inner)
        self.to_out = nn.Linear(inner, config.dim)

    def forward(self, x: Tensor, context: ForwardContext, layer: int, coords: TokenCoords) -> Tensor:
        """[B, S, dim] -> [B, S, dim]; coords: those of the tokens, for dropout."""
        inner = self.to_inner(x)
        if self.config.activation is Activation.glu:
            value, gate = inner.chunk(2, dim=-1)
            inner = value * F.gelu(gate)
        elif self.config.activation is Activation.gelu:
            inner = F.gelu(inner)
        elif self.config.activation is Activation.gelu_tanh:
            inner = F.gelu(inner, approximate="tanh")
        else:
            inner = F.relu(inner)
        dropout = context.dropout(self.config.ff_dropout)
        return self.to_out(token_dropout(inner, dropout, context.seed_for("feed_forward", layer), coords))
