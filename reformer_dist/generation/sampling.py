"""Texts drawn token by token, several at a time, each from a generator of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.errors import ConfigError
from reformer_dist.generation.decoder import Decoder, check_finite
from reformer_dist.seeds import derive_seed


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn. Raises ConfigError where it can't be."""

    temperature: float = 0.8
    """0 takes the most probable token each time."""
    top_k: int = 0
    """Only the k most probable tokens; 0 means all."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach this probability."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens that the text holds already are divided by this, negative ones multiplied
    (arXiv 1909.05858); 1 changes nothing."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, fits, right in (
            ("temperature", self.temperature, self.temperature >= 0, "must not be negative"),
            ("top-k", self.top_k, self.top_k >= 0, "must not be negative"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("repetition-penalty", self.repetition_penalty, self.repetition_penalty > 0, "must be above 0"),
        ):
            if not fits:
                raise ConfigError(f"--{name} {value}: {right}")


class TextSampler:
    """Rows of text that grow by a token each at a time: row i * n_samples + j is sample j of prompt i.

    What a row draws depends on its prompt, its number and options.seed alone, but for the rounding of batches.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Tensor],
        options: SamplingOptions,
        *,
        n_samples: int = 1,
        first_prompt: int = 0,
        unpenalized: int | None = None,
    ) -> None:
        """prompts: [S] int64 each, at least one token, on the model's device.

        first_prompt: number of prompts[0] among all. unpenalized: a token without repetition penalty.
        """
        self._decoder, self._options, self._unpunished = decoder, options, unpenalized
        self._prompts, self._n_samples = prompts, n_samples
        self.rows = list(range(len(prompts) * n_samples))
        """Rows that still grow."""
        self._generators = [
            torch.Generator().manual_seed(derive_seed("sample", options.seed, first_prompt + prompt, sample))
            for prompt in range(len(prompts))
            for sample in range(n_samples)
        ]
        self._newest: list[int] = []
        self._seen: Tensor | None = None

    @torch.no_grad()
    def step(self) -> dict[int, int]:
        """The next token of each row that still grows."""
        logits = check_finite(self._next_logits())
        probabilities = next_probabilities(logits, self._options, self._penalized(logits.shape[1]))
        pairs = zip(probabilities, self._generators, strict=True)
        self._newest = [int(torch.multinomial(row, 1, generator=generator)) for row, generator in pairs]
        return dict(zip(self.rows, self._newest, strict=True))

    def end(self, ended: set[int]) -> None:
        """Rows that grow no more; the others go on as they would have."""
        kept = [index for index, row in enumerate(self.rows) if row not in ended]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in kept]
        self._generators = [self._generators[index] for index in kept]
        self._newest = [self._newest[index] for index in kept]
        self._seen = None if self._seen is None else self._seen[kept]
        if kept:
            self._decoder.select_rows(torch.tensor(kept, device=self._prompts[0].device))

    def _next_logits(self) -> Tensor:
        """[rows, V] float32, on the CPU."""
        if self._newest:
            tokens = torch.tensor(self._newest, device=self._prompts[0].device)
            return self._decoder.step(tokens).float().cpu()
        logits = self._decoder.prefill(*pad_left(self._prompts)).float().cpu()
        if self._n_samples == 1:
            return logits
        rows = torch.arange(len(self._prompts)).repeat_interleave(self._n_samples)
        self._decoder.select_rows(rows.to(self._prompts[0].device))
        return logits[rows]

    def _penalized(self, vocab_size: int) -> Tensor | None:
        """[rows, V] bool: tokens that a row holds already; None without a penalty."""
        if self._options.repetition_penalty == 1:
            return None
        if self._seen is None:
            self._seen = torch.zeros(len(self.rows), vocab_size, dtype=torch.bool)
            for row in self.rows:
                self._seen[row, self._prompts[row // self._n_samples].cpu()] = True
        if self._newest:
            self._seen[range(len(self.rows)), self._newest] = True
        if self._unpunished is not None:
            self._seen[:, self._unpunished] = False
        return self._seen


def generate(decoder: Decoder, prompt: Tensor, n_tokens: int, options: SamplingOptions) -> Iterator[int]:
    """Yields n_tokens token ids that go on from a prompt [S] int64 of at least one token."""
    sampler = TextSampler(decoder, [prompt], options)
    for _ in range(n_tokens):
        yield sampler.step()[0]


def pad_left(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, S] with padding before shorter prompts, and the mask that tells them apart if there is any."""
    tokens = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True, padding_side="left")
    lengths = torch.tensor([prompt.numel() for prompt in prompts], device=tokens.device)
    longest = tokens.shape[1]
    if bool((lengths == longest).all()):
        return tokens, None
    return tokens, torch.arange(longest, device=tokens.device) >= longest - lengths.unsqueeze(1)


def next_probabilities(logits: Tensor, options: SamplingOptions, penalized: Tensor | None = None) -> Tensor:
    """What the next token is drawn from, [B, V]. logits [B, V] float32; penalized [B, V]: seen before."""
    if penalized is not None:
        penalty = options.repetition_penalty
        logits = torch.where(penalized, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if options.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
    # the largest becomes 0 first: the smallest temperature then overflows towards no probability, not towards nan
    logits = (logits - logits.amax(dim=1, keepdim=True)) / options.temperature
    ranked, ids = logits.softmax(dim=1).sort(dim=1, descending=True, stable=True)
    if options.top_k > 0:
        ranked[:, options.top_k :] = 0.0
        ranked /= ranked.sum(dim=1, keepdim=True)
    # a token stays while those before it have not yet reached top_p; the first always does
    reached = ranked.cumsum(dim=1) - ranked
    ranked = ranked.masked_fill(reached >= options.top_p, 0.0)
    return torch.zeros_like(ranked).scatter_(1, ids, ranked)
