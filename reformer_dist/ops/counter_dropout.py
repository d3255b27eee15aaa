"""Dropout whose mask is a function of (seed, head, round, query, key): every path and every recompute agrees.

A counter-based generator in 32-bit integers, which wrap around alike on every device: nothing is stored, and
the order in which pairs are visited does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    """int32 keys of tokens, from the index of their (batch, head) and their position; shapes broadcast."""
    salt = signed32(seed ^ (seed >> 32) ^ (round_ * 0x9E3779B9) ^ (0x5BD1E995 if is_query else 0))
    key = _mix(position.to(torch.int32) + salt)
    return _mix(key ^ (head.to(torch.int32) * signed32(0x85EBCA6B)))


def keep_mask(query_keys: Tensor, key_keys: Tensor, dropout: float) -> Tensor:
    """True where a pair is kept, [..., queries, keys] from [..., queries] and [..., keys] token keys."""
    pair = _mix(query_keys.unsqueeze(-1) ^ key_keys.unsqueeze(-2))
    return (pair & 0x7FFFFFFF) >= int(dropout * 2**31)
