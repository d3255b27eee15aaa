"""What one forward call hands to every layer, and what a layer must find again when it is recomputed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor

from reformer_dist.config import ModelConfig, Position
from reformer_dist.models.sequence import SequenceAccess, WholeSequence
from reformer_dist.ops.dropout import TokenCoords
from reformer_dist.ops.lsh.attention import Exchange
from reformer_dist.ops.lsh.bucket_stats import BucketStats
from reformer_dist.ops.rotary import rotary_tables
from reformer_dist.seeds import derive_seed

WHOLE_SEQUENCE = WholeSequence()


class ForwardOptions(TypedDict, total=False):
    """The keywords that the forward of every model takes; all may be left out."""

    key_padding_mask: Tensor | None
    """[B, S] bool, True for real tokens, and positions count from the first of each row; None: all are real."""
    step: int | None
    """Training step, which draws that step's hash rotations; None: the fixed ones of evaluation."""
    dropout_seed: int | None
    """Of this step's dropout in training mode; None draws one from torch's generator."""
    rows: Tensor | None
    """[B] numbers of the rows among those of their step, which dropout masks depend on; None: 0, 1, .."""
    bucket_stats: list[BucketStats] | None
    """LSH layers append their statistics."""
    sequence: SequenceAccess
    """Where the tokens are not whole sequences, which part they are (`models.sequence`); a
    `models.decoding.DecodingState` goes on with the texts that it remembers."""


@dataclass(frozen=True)
class EncodedSource:
    """What an encoder made of the texts that a decoder reads."""

    hidden: Tensor
    """[B, T, dim] float32: gradients of all layers that read it are summed in it."""
    key_padding_mask: Tensor | None
    """[B, T], True for real tokens."""
    sequence: SequenceAccess
    """Which part of each source is at hand."""


@dataclass(frozen=True)
class ForwardContext:
    """Constants of one forward call. Every random draw is a function of them, so a recompute repeats it."""

    dropout_seed: int | None
    """Of this call's dropout masks; None switches dropout off."""
    rotation_seed: int
    """Of this call's hash rotations: one for each training step, a fixed one in evaluation."""
    coords: TokenCoords
    """Which tokens of the step are at hand: dropout masks are functions of their coords."""
    sequence: SequenceAccess
    """How attention reaches the rest of the sequence."""
    key_padding_mask: Tensor | None = None
    """[B, S], True for real tokens."""
    rotary: tuple[Tensor, Tensor] | None = None
    """cos and sin [S, head_dim / 2], or [B, S, head_dim / 2], of rotary positions."""
    bucket_stats: list[BucketStats] | None = None
    """Where LSH layers leave their statistics, if they are wanted."""
    source: EncodedSource | None = None
    """What the layers of a decoder read."""

    def seed_for(self, *place: int | str) -> int:
        """Seed of the dropout at a place, such as ("attention", layer)."""
        return derive_seed("dropout", self.dropout_seed or 0, *place)

    def dropout(self, p: float) -> float:
        return 0.0 if self.dropout_seed is None else p

    def skips_layer(self, layer: int, share: float) -> bool:
        """Whether this training step goes around a layer; alike on every rank, whose seeds are the same."""
        share = self.dropout(share)
        return share > 0.0 and self.seed_for("layer_drop", layer) < share * 2**63


def build_context(
    config: ModelConfig,
    seed: int,
    n_tokens: int,
    device: torch.device,
    options: ForwardOptions,
    *,
    is_training: bool,
) -> ForwardContext:
    """The context of one forward call on rows of n_tokens. seed: the model's; is_training switches dropout on."""
    sequence, step, mask = options.get("sequence", WHOLE_SEQUENCE), options.get("step"), options.get("key_padding_mask")
    coords = TokenCoords(options.get("rows"), sequence.positions(n_tokens, device, mask))
    dropout_seed = options.get("dropout_seed")
    if not is_training:
        dropout_seed = None
    elif dropout_seed is None:
        dropout_seed = int(torch.randint(2**62, (1,)).item())
    rotary = None
    if config.position is Position.rotary:
        rotary = rotary_tables(coords.positions, config.resolved_head_dim)
    phase = "evaluation" if step is None else "training"
    rotation_seed = derive_seed("rotations", seed, phase, step or 0)
    return ForwardContext(dropout_seed, rotation_seed, coords, sequence, mask, rotary, options.get("bucket_stats"))


@dataclass
class RecomputeCache:
    """What a layer's first run decides and its recompute must not decide anew.

    A token near the border of two buckets, rebuilt with a rounding error, would fall on the other side.
    """

    exchanges: dict[int, Exchange] = field(default_factory=dict)
    """By layer: bucket ids, and how their tokens travel between ranks."""
    query_ids: dict[int, Tensor] = field(default_factory=dict)
    """[B, H, R, S] by layer: those of the queries of LSH cross attention."""
    key_ids: dict[int, Tensor] = field(default_factory=dict)
    """[B, H, R, T] of its keys."""
