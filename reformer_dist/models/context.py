"""What one forward call hands to every layer, and what a layer must find again when it is recomputed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from reformer_dist.models.sequence import SequenceAccess
from reformer_dist.ops.dropout import TokenPlaces
from reformer_dist.ops.lsh.health import LSHHealth
from reformer_dist.seeds import derive_seed


@dataclass(frozen=True)
class ForwardContext:
    """Constants of one forward call. Every random draw is a function of them, so a recompute repeats it."""

    dropout_seed: int | None
    """Of this call's dropout masks; None switches dropout off."""
    rotation_seed: int
    """Of this call's hash rotations: one for each training step, a fixed one in evaluation."""
    places: TokenPlaces
    """Which tokens of the step are at hand: dropout masks are functions of their places."""
    sequence: SequenceAccess
    """How attention reaches the rest of the sequence."""
    key_padding_mask: Tensor | None = None
    """[B, S], True for real tokens."""
    rotary: tuple[Tensor, Tensor] | None = None
    """cos and sin [S, head_dim / 2], or [B, S, head_dim / 2], of rotary positions."""
    health: list[LSHHealth] | None = None
    """Where LSH layers leave their statistics, if they are wanted."""

    def seed_for(self, *place: int | str) -> int:
        """Seed of the dropout at a place, such as ("attention", layer)."""
        return derive_seed("dropout", self.dropout_seed or 0, *place)

    def dropout(self, p: float) -> float:
        return 0.0 if self.dropout_seed is None else p


@dataclass
class Memo:
    """What a layer's first run decides and its recompute must not decide anew.

    A token near the border of two buckets, rebuilt with a rounding error, would fall on the other side.
    """

    bucket_ids: dict[int, Tensor] = field(default_factory=dict)
    """[B, H, R, S] by layer."""
    plans: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By layer: how tokens travelled between ranks, where they did."""
