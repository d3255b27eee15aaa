"""Token-by-token decoding, and the distance of tokens from bucket boundaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from reformer_dist.models import ReformerLM, attention
from reformer_dist.models.decoding import DecodingState
from reformer_dist.ops.lsh.hashing import FLOOR_SPAN, LARGEST_FACTOR, bucket_factors

INFINITY = float("inf")


def left_padding(lengths: list[int], seq_len: int) -> Tensor:
    """[B, S] mask of left-padded rows of these lengths."""
    return torch.arange(seq_len) >= seq_len - torch.tensor(lengths).unsqueeze(1)


@torch.no_grad()
def decoded_logits(model: ReformerLM, tokens: Tensor, n_prompt: int, mask: Tensor | None = None) -> Tensor:
    """Logits [B, S, V] of tokens [B, S]: prefill of n_prompt tokens, then one token at a time."""
    return logits_of_steps(model, DecodingState(model.config), tokens, n_prompt, mask)


@torch.no_grad()
def logits_of_steps(
    model: Callable[..., Tensor], state: DecodingState, tokens: Tensor, n_prompt: int, mask: Tensor | None
) -> Tensor:
    """`decoded_logits` of any callable with a language model's signature."""
    prompt_mask = None if mask is None else mask[:, :n_prompt]
    logits = [model(tokens[:, :n_prompt], key_padding_mask=prompt_mask, sequence=state)]
    logits += [model(token, sequence=state) for token in tokens[:, n_prompt:].split(1, dim=1)]
    return torch.cat(logits, dim=1)


@torch.no_grad()
def logits_and_margin(
    model: Callable[..., Tensor], tokens: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, float]:
    """Logits of the whole forward, and the smallest distance of a real token from a bucket boundary.

    A token closer than rounding may fall on either side. Units: of a projection of its query on a random direction
    (rotation), or of a cell's width (floor). Keys of a source, which have another length, are ignored.
    """
    margins = [INFINITY]
    hash_vectors = attention.hash_vectors

    def look(vectors: Tensor, rotations: Tensor, n_buckets: int, scheme: str, **given: Any) -> Tensor:
        real = torch.ones(tokens.shape, dtype=torch.bool) if mask is None else mask
        of_tokens = vectors.shape[2] == tokens.shape[1]
        for round_ in range(rotations.shape[1] if of_tokens else 0):
            gaps = _gaps(vectors, rotations[:, round_], n_buckets, scheme)
            margins.append(gaps.masked_fill(~real[:, None, :, None], INFINITY).min().item())
        return hash_vectors(vectors, rotations, n_buckets, scheme, **given)

    with mock.patch.object(attention, "hash_vectors", look):
        logits = model(tokens, key_padding_mask=mask)
    return logits, min(margins)


def _gaps(vectors: Tensor, rotation: Tensor, n_buckets: int, scheme: str) -> Tensor:
    """[B, H, S, factors]: distance from the boundary, for each digit of a token's bucket in one round."""
    factors = bucket_factors(n_buckets, LARGEST_FACTOR[scheme])
    if not factors:
        return torch.full((*vectors.shape[:3], 1), INFINITY)
    if scheme == "floor":
        cells = torch.nn.functional.normalize(vectors, dim=-1) @ rotation * torch.tensor(factors) / FLOOR_SPAN
        return (cells - cells.round()).abs()
    parts = (vectors @ rotation).split([factor // 2 for factor in factors], dim=-1)
    best = [torch.cat([part, -part], dim=-1).topk(2, dim=-1).values for part in parts]
    return torch.stack([values[..., 0] - values[..., 1] for values in best], dim=-1)
