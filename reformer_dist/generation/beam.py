"""Beam search: the texts of the highest probability that are found by keeping the best few beginnings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.errors import ConfigError
from reformer_dist.generation.decoder import Decoder, check_finite


@dataclass(frozen=True)
class BeamOptions:
    """Raises ConfigError where there can be no search."""

    beams: int = 4
    """Beginnings that are kept."""
    length_penalty: float = 1.0
    """A text of n tokens scores log-probability / n ** length_penalty: 0 favours short ones, 1 compares means."""

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ConfigError(f"--beams {self.beams}: must be positive")
        if self.length_penalty < 0:
            raise ConfigError(f"--length-penalty {self.length_penalty}: must not be negative")


@dataclass(frozen=True)
class Hypothesis:
    tokens: list[int]
    """Behind the prompt; the last is the end, where there is one."""
    score: float


@torch.no_grad()
def beam_search(
    decoder: Decoder,
    prompt: Tensor,
    n_tokens: int,
    options: BeamOptions,
    is_end: Callable[[list[int]], bool],
) -> list[Hypothesis]:
    """At most options.beams texts of at most n_tokens tokens behind prompt [S], the best first.

    is_end: whether a text, given as its tokens behind the prompt, is over with its last token. Raises UserError
    where logits are not finite.
    """
    search = _Search(options, n_tokens, is_end)
    log_probabilities = _log_probabilities(decoder.prefill(prompt.unsqueeze(0)))
    while not search.grow(log_probabilities):
        if search.origins != list(range(log_probabilities.shape[0])):
            decoder.select_rows(torch.tensor(search.origins, device=prompt.device))
        newest = torch.tensor([tokens[-1] for tokens in search.alive], device=prompt.device)
        log_probabilities = _log_probabilities(decoder.step(newest))
    return search.best()


def _log_probabilities(logits: Tensor) -> Tensor:
    return check_finite(logits.float()).log_softmax(dim=-1).cpu()


class _Search:
    """Which beginnings are kept, and which texts are over."""

    def __init__(self, options: BeamOptions, n_tokens: int, is_end: Callable[[list[int]], bool]) -> None:
        self._options, self._n_tokens, self._is_end = options, n_tokens, is_end
        self.alive: list[list[int]] = [[]]
        """Tokens of each beginning, the best first."""
        self.origins: list[int] = []
        """Which of the beginnings before each went on from."""
        self._sums = torch.zeros(1, dtype=torch.float64)
        self._ended: list[Hypothesis] = []

    def grow(self, log_probabilities: Tensor) -> bool:
        """By one token, given those of the next one [alive, V]; returns whether the search is over."""
        totals = self._sums.unsqueeze(1) + log_probabilities.double()
        beams, vocab_size = self._options.beams, totals.shape[1]
        # each beginning has one end-of-text token: twice the beams leave as many that go on
        best, flat = totals.flatten().topk(min(2 * beams, totals.numel()))
        alive: list[list[int]] = []
        origins: list[int] = []
        sums: list[float] = []
        for total, index in zip(best.tolist(), flat.tolist(), strict=True):
            origin, token = divmod(index, vocab_size)
            tokens = [*self.alive[origin], token]
            if self._is_end(tokens) or len(tokens) == self._n_tokens:
                self._ended.append(Hypothesis(tokens, self._score(total, len(tokens))))
            elif len(alive) < beams:
                alive.append(tokens)
                origins.append(origin)
                sums.append(total)
        self.alive, self.origins, self._sums = alive, origins, torch.tensor(sums, dtype=torch.float64)
        self._ended = self.best()
        return self._is_over()

    def best(self) -> list[Hypothesis]:
        ranked = sorted(self._ended, key=lambda hypothesis: hypothesis.score, reverse=True)
        return ranked[: self._options.beams]

    def _is_over(self) -> bool:
        if not self.alive:
            return True
        # log-probabilities only fall: no beginning can come to more than its own at the greatest length
        most = self._score(float(self._sums[0]), self._n_tokens)
        return len(self._ended) == self._options.beams and self._ended[-1].score >= most

    def _score(self, total: float, length: int) -> float:
        return total / length**self._options.length_penalty
