"""Batched sampling: one token per sequence and step, with an independent generator per sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.errors import ConfigError
from reformer_dist.generation.decoder import Decoder, check_finite
from reformer_dist.ops.checks import TensorChecks, check_integer
from reformer_dist.seeds import derive_seed


@dataclass(frozen=True)
class SamplingOptions:
    """Parameters of sampling. Raises ConfigError if one is out of range."""

    temperature: float = 0.8
    """0 is greedy decoding."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0: all."""
    top_p: float = 1.0
    """Sample from the smallest set of most probable tokens whose probability reaches this."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens already in the sequence are divided by this, negative ones multiplied
    (arXiv 1909.05858); 1 disables it."""
    seed: int = 0

    def __post_init__(self) -> None:
        penalty = self.repetition_penalty
        for name, value, is_valid, requirement in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "must be finite and not negative"),
            ("top-k", self.top_k, self.top_k >= 0, "must not be negative"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("repetition-penalty", penalty, 0 < penalty < math.inf, "must be finite and above 0"),
        ):
            if not is_valid:
                raise ConfigError(f"--{name} {value}: {requirement}")


class TextSampler:
    """Samples a batch of sequences step by step; row i * n_samples + j is sample j of prompt i.

    A row's tokens depend only on its prompt, its index and options.seed, up to rounding in batched products.
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

        first_prompt: index of prompts[0] among all prompts. unpenalized: token exempt from the repetition penalty.
        Raises ValueError.
        """
        if not prompts:
            raise ValueError("prompts=[]: must not be empty")
        checks = TensorChecks()
        for index, prompt in enumerate(prompts):
            checks.integers(f"prompts[{index}]", prompt, f"S{index}")
        check_integer("n_samples", n_samples, least=1)
        check_integer("first_prompt", first_prompt, least=0)
        self._decoder, self._options, self._unpunished = decoder, options, unpenalized
        self._prompts, self._n_samples = prompts, n_samples
        self.rows = list(range(len(prompts) * n_samples))
        """Unfinished rows."""
        self._generators = [
            torch.Generator().manual_seed(derive_seed("sample", options.seed, first_prompt + prompt, sample))
            for prompt in range(len(prompts))
            for sample in range(n_samples)
        ]
        self._newest: list[int] = []
        self._seen: Tensor | None = None

    @torch.no_grad()
    def step(self) -> dict[int, int]:
        """Samples the next token of each unfinished row."""
        logits = check_finite(self._next_logits())
        probabilities = next_probabilities(logits, self._options, self._penalized(logits.shape[1]))
        pairs = zip(probabilities, self._generators, strict=True)
        self._newest = [int(torch.multinomial(row, 1, generator=generator)) for row, generator in pairs]
        return dict(zip(self.rows, self._newest, strict=True))

    def finish(self, finished: set[int]) -> None:
        """Removes rows; the tokens of the others do not change."""
        kept = [index for index, row in enumerate(self.rows) if row not in finished]
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
        rows = torch.arange(len(self._prompts), device="cpu").repeat_interleave(self._n_samples)
        self._decoder.select_rows(rows.to(self._prompts[0].device))
        return logits[rows]

    def _penalized(self, vocab_size: int) -> Tensor | None:
        """[rows, V] bool: tokens already in each row; None without a penalty."""
        if self._options.repetition_penalty == 1:
            return None
        if self._seen is None:
            self._seen = torch.zeros(len(self.rows), vocab_size, dtype=torch.bool, device="cpu")
            for row in self.rows:
                self._seen[row, self._prompts[row // self._n_samples].cpu()] = True
        if self._newest:
            self._seen[range(len(self.rows)), self._newest] = True
        if self._unpunished is not None:
            self._seen[:, self._unpunished] = False
        return self._seen


def generate(decoder: Decoder, prompt: Tensor, n_tokens: int, options: SamplingOptions) -> Iterator[int]:
    """Yields n_tokens token ids that continue a prompt [S] int64 of at least one token. Raises ValueError."""
    check_integer("n_tokens", n_tokens, least=0)
    sampler = TextSampler(decoder, [prompt], options)
    return (sampler.step()[0] for _ in range(n_tokens))


def pad_left(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Left-pads prompts to tokens [B, S]; also returns their mask, None if all have the same length."""
    tokens = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True, padding_side="left")
    lengths = torch.tensor([prompt.numel() for prompt in prompts], device=tokens.device)
    longest = tokens.shape[1]
    if bool((lengths == longest).all()):
        return tokens, None
    return tokens, torch.arange(longest, device=tokens.device) >= longest - lengths.unsqueeze(1)


def next_probabilities(logits: Tensor, options: SamplingOptions, penalized: Tensor | None = None) -> Tensor:
    """Sampling distribution [B, V] of logits [B, V] float32. penalized [B, V]: tokens already in the sequence."""
    if penalized is not None:
        penalty = options.repetition_penalty
        logits = torch.where(penalized, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if options.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
    # subtract the maximum first, so that tiny temperatures overflow to probability 0 instead of nan
    logits = (logits - logits.amax(dim=1, keepdim=True)) / options.temperature
    ranked, ids = logits.softmax(dim=1).sort(dim=1, descending=True, stable=True)
    if options.top_k > 0:
        ranked[:, options.top_k :] = 0.0
        ranked /= ranked.sum(dim=1, keepdim=True)
    # keep a token while the more probable ones have not reached top_p; the first is always kept
    mass_before = ranked.cumsum(dim=1) - ranked
    ranked = ranked.masked_fill(mass_before >= options.top_p, 0.0)
    return torch.zeros_like(ranked).scatter_(1, ids, ranked)
