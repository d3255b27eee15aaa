"""What a `Predictor` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Classification:
    label: str
    """The most probable one."""
    score: float
    """Its probability."""
    scores: dict[str, float]
    """The probability of each label."""


@dataclass(frozen=True)
class Answer:
    text: str
    score: float
    """Logits of the span minus those of "no answer"; below 0, "no answer" is more probable."""
    start: int | None
    end: int | None
    """context[start:end] is the text. None if the vocabulary does not preserve text, which moves answers."""


@dataclass(frozen=True)
class Candidate:
    text: str
    score: float
    """Probability of the token."""


@dataclass(frozen=True)
class FilledText:
    text: str
    """With the most probable token at each mask."""
    masks: list[list[Candidate]]
    """The most probable tokens at each mask, best first."""


@dataclass(frozen=True)
class Target:
    """A generated translation or summary."""

    text: str
    score: float
    """Mean log-probability of its tokens, in nats."""


@dataclass(frozen=True)
class TextScore:
    log_prob: float
    """Of the whole text, in nats."""
    n_tokens: int
    n_bytes: int

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(-self.log_prob / self.n_tokens)

    @property
    def bits_per_byte(self) -> float:
        return -self.log_prob / math.log(2) / self.n_bytes
