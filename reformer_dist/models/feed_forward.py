"""Feed-forward layer. It is token-wise, so a caller may run it on chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from reformer_dist.config import Activation, ModelConfig
from reformer_dist.models.context import ForwardContext
from reformer_dist.ops.dropout import TokenCoords, token_dropout

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.gelu: F.gelu,
    Activation.gelu_tanh: partial(F.gelu, approximate="tanh"),
    Activation.relu: F.relu,
    Activation.silu: F.silu,
    Activation.glu: F.gelu,
    Activation.swiglu: F.silu,
}


class FeedForward(nn.Module):
    """Linear, activation, linear. `glu` is gated with GELU and `swiglu` with SiLU, at the same inner width (arXiv
    2002.05202).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.resolved_ff_dim
        self.to_inner = nn.Linear(config.dim, 2 * inner if config.activation.is_gated else inner)
        self.to_out = nn.Linear(inner, config.dim)

    def forward(self, x: Tensor, context: ForwardContext, layer: int, coords: TokenCoords) -> Tensor:
        """[B, S, dim] -> [B, S, dim]; coords: those of the tokens, for dropout."""
        inner = self.to_inner(x)
        activation = ACTIVATIONS[self.config.activation]
        if self.config.activation.is_gated:
            value, gate = inner.chunk(2, dim=-1)
            inner = value * activation(gate)
        else:
            inner = activation(inner)
        dropout = context.dropout(self.config.ff_dropout)
        return self.to_out(token_dropout(inner, dropout, context.seed_for("feed_forward", layer), coords))
