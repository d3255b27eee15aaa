"""Counter-based dropout of hidden states: the mask is a function of (seed, batch row, position, channel).

A recompute, another chunk size, micro-batch size or number of ranks therefore draws the same mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.checks import TensorChecks, check_dropout, check_integer, one_per_row_or_shared


@dataclass(frozen=True)
class TokenCoords:
    """Coordinates of the local tokens in the global batch."""

    rows: Tensor | None
    """[B] indices of the rows in the global batch; None: 0, 1, .."""
    positions: Tensor
    """[S] positions in the whole sequence, or [B, S] where rows differ."""

    def check(self, x: Tensor) -> None:
        """Raises ValueError unless these are coordinates of the tokens of x [B, S, C]."""
        checks = TensorChecks()
        checks.floats("x", x, "B S C")
        if self.rows is not None:
            checks.integers("rows", self.rows, "B")
        checks.integers("positions", self.positions, one_per_row_or_shared(self.positions, "B S"))

    def chunk(self, start: int, stop: int) -> TokenCoords:
        return TokenCoords(self.rows, self.positions[..., start:stop])


def token_dropout(x: Tensor, dropout: float, seed: int, coords: TokenCoords) -> Tensor:
    """Zeroes a fraction `dropout` of x [B, S, C] and rescales the rest, without touching any random state.

    Raises ValueError unless x is [B, S, C], coords are those of its tokens, and dropout is a probability below 1.
    """
    if dropout == 0.0:
        return x
    check_dropout("dropout", dropout)
    check_integer("seed", seed)
    coords.check(x)
    row = torch.arange(x.shape[0], device=x.device) if coords.rows is None else coords.rows
    tokens = token_keys(row.unsqueeze(1), coords.positions, 0, seed, is_query=True)
    channel = torch.arange(x.shape[2], device=x.device)
    channels = token_keys(torch.zeros_like(channel), channel, 0, seed, is_query=False)
    kept = keep_mask(tokens, channels.expand(x.shape[0], -1), dropout)
    return x * kept.to(x.dtype).div_(1.0 - dropout)


def _mix(x: Tensor) -> Tensor:
    """A bijection of int32 whose output bits each depend on every input bit (in place)."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16) & 0xFFFF
    return x


def signed32(number: int) -> int:
    """The int32 of the number's low 32 bits."""
    number &= 0xFFFFFFFF
    return number - 2**32 if number >= 2**31 else number


def token_keys(head: Tensor, position: Tensor, round_: int, seed: int, is_query: bool) -> Tensor:
    """int32 keys of tokens from their head index (batch row x head) and position; shapes broadcast."""
    salt = signed32(seed ^ (seed >> 32) ^ (round_ * 0x9E3779B9) ^ (0x5BD1E995 if is_query else 0))
    key = _mix(position.to(torch.int32) + salt)
    return _mix(key ^ (head.to(torch.int32) * signed32(0x85EBCA6B)))


def keep_mask(query_keys: Tensor, key_keys: Tensor, dropout: float) -> Tensor:
    """True for kept pairs: [..., queries, keys] from token keys [..., queries] and [..., keys]."""
    pair = _mix(query_keys.unsqueeze(-1) ^ key_keys.unsqueeze(-2))
    return (pair & 0x7FFFFFFF) >= int(dropout * 2**31)
