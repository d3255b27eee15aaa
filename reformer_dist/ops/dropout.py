"""Dropout of hidden vectors whose mask is a function of (seed, batch row, position, channel).

Nothing else enters: a recompute, another chunk size, micro-batch or number of ranks draws the same mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.counter_dropout import keep_mask, token_keys


@dataclass(frozen=True)
class TokenPlaces:
    """Which tokens of a step are at hand."""

    rows: Tensor | None
    """[B] numbers of the batch rows in their step; None: 0, 1, .."""
    positions: Tensor
    """[S] in the whole sequence, or [B, S] where rows differ."""

    def chunk(self, start: int, stop: int) -> TokenPlaces:
        return TokenPlaces(self.rows, self.positions[..., start:stop])


def token_dropout(x: Tensor, dropout: float, seed: int, places: TokenPlaces) -> Tensor:
    """Zeroes a share `dropout` of x [B, S, C] and scales the rest; no random state is read or moved."""
    if dropout == 0.0:
        return x
    row = torch.arange(x.shape[0], device=x.device) if places.rows is None else places.rows
    tokens = token_keys(row.unsqueeze(1), places.positions, 0, seed, is_query=True)
    channel = torch.arange(x.shape[2], device=x.device)
    channels = token_keys(torch.zeros_like(channel), channel, 0, seed, is_query=False)
    kept = keep_mask(tokens, channels.expand(x.shape[0], -1), dropout)
    return x * kept.to(x.dtype).div_(1.0 - dropout)
