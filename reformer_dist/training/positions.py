"""Loss by the position of a token in its row, in octaves: what more context is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.training.metrics import bits_per_byte

FIRST_OCTAVE = 64
"""Positions below it are one group; the others are [64, 128), [128, 256) and so on."""
MAX_OCTAVES = 32


@dataclass(frozen=True)
class PositionLoss:
    """The loss of the labels at some positions of their rows."""

    first: int
    last: int
    loss: float
    """Mean in nats per label."""
    bits_per_byte: float | None
    n_labels: int

    @property
    def name(self) -> str:
        """The positions, such as 64-127."""
        return f"{self.first}-{self.last}"


class PositionSums:
    """Sums of losses, labels and bytes by octave of positions."""

    def __init__(self, token_bytes: Tensor | None) -> None:
        """token_bytes: bytes of text of each token, [vocab_size], if losses are also in bits per byte."""
        self._token_bytes = token_bytes
        self.sums = torch.zeros(3, MAX_OCTAVES, dtype=torch.float64)
        """Nats, labels and bytes of each octave."""

    def add(self, losses: Tensor, labels: Tensor, counted: Tensor, positions: Tensor) -> None:
        """losses, labels and the mask of those that count: [B, S]; positions [S] or [B, S]. All on the CPU."""
        octaves = octave_of(positions).expand_as(labels)[counted]
        bytes_ = torch.zeros(len(octaves)) if self._token_bytes is None else self._token_bytes[labels[counted]]
        values = torch.stack([losses[counted].double(), torch.ones(len(octaves)).double(), bytes_.double()])
        self.sums.index_add_(1, octaves, values)

    def result(self, sums: Sequence[float]) -> list[PositionLoss]:
        """The loss of each octave that has labels. sums: `self.sums` over all ranks, flattened."""
        table = torch.tensor(sums, dtype=torch.float64).view(3, MAX_OCTAVES).T.tolist()
        return [
            PositionLoss(
                first=0 if octave == 0 else FIRST_OCTAVE << (octave - 1),
                last=(FIRST_OCTAVE << octave) - 1,
                loss=nats / n_labels,
                bits_per_byte=None if self._token_bytes is None else bits_per_byte(nats, n_bytes),
                n_labels=int(n_labels),
            )
            for octave, (nats, n_labels, n_bytes) in enumerate(table)
            if n_labels and (n_bytes or self._token_bytes is None)
        ]


def octave_of(positions: Tensor) -> Tensor:
    """Number of the octave of each position: 0 below FIRST_OCTAVE, 1 below twice that, and so on."""
    exponents = torch.frexp(positions.double())[1].long() - 1  # floor(log2(position)), exactly
    return (exponents - FIRST_OCTAVE.bit_length() + 2).clamp_min(0)
