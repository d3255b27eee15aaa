"""Beam search: approximates the most probable sequences by keeping the best few prefixes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.errors import ConfigError
from reformer_dist.generation.decoder import Decoder, check_finite
from reformer_dist.ops.checks import TensorChecks, check_integer


@dataclass(frozen=True)
class BeamOptions:
    """Parameters of beam search. Raises ConfigError if one is out of range."""

    beams: int = 4
    """Prefixes kept per step."""
    length_penalty: float = 1.0
    """n tokens score log-probability / n ** length_penalty: 0 favors short sequences, 1 compares means."""

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ConfigError(f"--beams {self.beams}: must be positive")
        if not 0 <= self.length_penalty < math.inf:
            raise ConfigError(f"--length-penalty {self.length_penalty}: must be finite and not negative")


@dataclass(frozen=True)
class Hypothesis:
    tokens: list[int]
    """Tokens after the prompt, including the end token if there is one."""
    score: float


@torch.no_grad()
def beam_search(
    decoder: Decoder,
    prompt: Tensor,
    n_tokens: int,
    options: BeamOptions,
    is_end: Callable[[list[int]], bool],
) -> list[Hypothesis]:
    """Returns at most options.beams continuations of prompt [S], of at most n_tokens tokens, best first.

    is_end: whether a continuation, given as its tokens, is complete. Raises UserError if logits are not finite,
    ValueError if prompt or n_tokens are not valid.
    """
    TensorChecks().integers("prompt", prompt, "S")
    check_integer("n_tokens", n_tokens, least=1)
    search = _Search(options, n_tokens, is_end)
    log_probs = _log_probs(decoder.prefill(prompt.unsqueeze(0)))
    while not search.advance(log_probs):
        if search.parents != list(range(log_probs.shape[0])):
            decoder.select_rows(torch.tensor(search.parents, device=prompt.device))
        newest = torch.tensor([tokens[-1] for tokens in search.alive], device=prompt.device)
        log_probs = _log_probs(decoder.step(newest))
    return search.best()


def _log_probs(logits: Tensor) -> Tensor:
    return check_finite(logits.float()).log_softmax(dim=-1).cpu()


class _Search:
    """Live prefixes and finished hypotheses."""

    def __init__(self, options: BeamOptions, n_tokens: int, is_end: Callable[[list[int]], bool]) -> None:
        self._options, self._n_tokens, self._is_end = options, n_tokens, is_end
        self.alive: list[list[int]] = [[]]
        """Tokens of each live prefix, best first."""
        self.parents: list[int] = []
        """For each live prefix, the index of the previous step's prefix that it extends."""
        self._scores = torch.zeros(1, dtype=torch.float64, device="cpu")
        """Log-probabilities of the live prefixes."""
        self._finished: list[Hypothesis] = []

    def advance(self, log_probs: Tensor) -> bool:
        """Extends prefixes by one token with log-probabilities [alive, V]; returns whether the search is over."""
        totals = self._scores.unsqueeze(1) + log_probs.double()
        beams, vocab_size = self._options.beams, totals.shape[1]
        # each prefix has one end-of-text token, so twice the beams leave enough unfinished ones
        best, flat = totals.flatten().topk(min(2 * beams, totals.numel()))
        alive: list[list[int]] = []
        parents: list[int] = []
        scores: list[float] = []
        for total, index in zip(best.tolist(), flat.tolist(), strict=True):
            parent, token = divmod(index, vocab_size)
            tokens = [*self.alive[parent], token]
            if self._is_end(tokens) or len(tokens) == self._n_tokens:
                self._finished.append(Hypothesis(tokens, self._score(total, len(tokens))))
            elif len(alive) < beams:
                alive.append(tokens)
                parents.append(parent)
                scores.append(total)
        self.alive, self.parents = alive, parents
        self._scores = torch.tensor(scores, dtype=torch.float64, device="cpu")
        self._finished = self.best()
        return self._is_over()

    def best(self) -> list[Hypothesis]:
        ranked = sorted(self._finished, key=lambda hypothesis: hypothesis.score, reverse=True)
        return ranked[: self._options.beams]

    def _is_over(self) -> bool:
        if not self.alive:
            return True
        # log-probabilities only decrease, so this bounds the score of every extension
        bound = self._score(float(self._scores[0]), self._n_tokens)
        return len(self._finished) == self._options.beams and self._finished[-1].score >= bound

    def _score(self, total: float, length: int) -> float:
        return total / length**self._options.length_penalty
