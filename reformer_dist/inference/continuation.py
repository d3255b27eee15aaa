"""Texts that continue prompts, or the targets of sources, by sampling or beam search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

import torch
from torch import Tensor

from reformer_dist.config import TaskKind
from reformer_dist.data import Tokenizer
from reformer_dist.errors import ConfigError
from reformer_dist.generation import (
    BeamOptions,
    SamplingOptions,
    TextSampler,
    TextStream,
    beam_search,
    make_decoder,
)
from reformer_dist.generation.decoder import PrefixDecoder, last_document
from reformer_dist.generation.text_stream import CONTEXT
from reformer_dist.run.pretrained import LoadedModel

MAX_BATCH = 16
READ_TOKENS = 16  # of the rest of a prompt in a step
SAMPLING: dict[str, float] = {"temperature": 0.8, "top_k": 0, "top_p": 0.95, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Prompt:
    name: str
    """Its option or argument, for error messages."""
    text: bytes


@dataclass(frozen=True)
class TextOptions:
    """How texts are generated, validated as far as possible without a model."""

    max_new_tokens: int
    samples: int
    stop: Sequence[str]
    sampling: SamplingOptions
    beams: BeamOptions | None


def text_options(
    *,
    max_new_tokens: int = 200,
    samples: int = 1,
    stop: Sequence[str] = (),
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    beams: int | None = None,
    length_penalty: float | None = None,
    seed: int = 0,
) -> TextOptions:
    """Options of reformer-generate; None is the default of an option. Raises ConfigError, which names options."""
    for name, value in (("max-new-tokens", max_new_tokens), ("samples", samples)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: must be positive")
    if "" in stop:
        raise ConfigError("--stop '': must not be empty")
    given: dict[str, float | None] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if beams is None and length_penalty is not None:
        raise ConfigError(f"--length-penalty {length_penalty}: needs --beams")
    if beams is not None:
        for name, number in options.items():
            raise ConfigError(f"--{name.replace('_', '-')} {number}: excludes --beams, which does not sample")
        if samples > beams:
            raise ConfigError(f"--samples {samples}: must be at most --beams {beams}")
    search = None if beams is None else BeamOptions(beams, 1.0 if length_penalty is None else length_penalty)
    sampling = SamplingOptions(**{**SAMPLING, **options}, seed=seed)  # type: ignore[arg-type]
    return TextOptions(max_new_tokens, samples, stop, sampling, search)


class TextWriter(Protocol):
    """Receives texts; row i * samples + j is text j of prompt i. Parts of rows interleave."""

    def write(self, row: int, text: str) -> None: ...

    def end(self, row: int, *, is_cut: bool) -> None:
        """The text of a row is complete. is_cut: it ended at the last position of the model."""


class CollectedTexts:
    """A TextWriter that keeps texts, by row."""

    def __init__(self, n_rows: int) -> None:
        self.texts = [""] * n_rows

    def write(self, row: int, text: str) -> None:
        self.texts[row] += text

    def end(self, row: int, *, is_cut: bool) -> None:
        pass


def generate_texts(
    loaded: LoadedModel, prompts: Sequence[Prompt], options: TextOptions, writer: TextWriter
) -> None:
    """Generates options.samples texts for each prompt, or for each source of sequence_to_sequence.

    Raises ConfigError for a prompt that does not fit the model, and CheckpointError for a model that can't write.
    """
    encoded = [encode_prompt(loaded, prompt) for prompt in prompts]
    if options.beams is not None:
        _search(loaded, encoded, options, options.beams, writer)
        return
    size = max(1, MAX_BATCH // options.samples)
    for first in range(0, len(encoded), size):
        _sample(loaded, encoded[first : first + size], first, options, writer)


def _sample(
    loaded: LoadedModel, prompts: list[Tensor], first: int, options: TextOptions, writer: TextWriter
) -> None:
    texts = SampledTexts(loaded, prompts, options, first_prompt=first)
    while not texts.is_done:
        for step in texts.step():
            row = first * options.samples + step.row
            writer.write(row, step.text)
            if step.end is not None:
                writer.end(row, is_cut=step.end is TextEnd.max_positions)


class TextEnd(Enum):
    """What ended a text."""

    end_of_text = auto()
    stop_string = auto()
    max_new_tokens = auto()
    max_positions = auto()
    """The last position of the model."""


@dataclass(frozen=True)
class TextStep:
    """What one sampled token adds to a text."""

    row: int
    text: str
    """That became printable; the rest of the text at its end."""
    end: TextEnd | None


class SampledTexts:
    """Texts in progress, sampled together: row i * options.samples + j is text j of prompt i.

    The rows of one object share each product of matrices. Objects share nothing: stepped in any order, each gives
    the same texts.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: list[Tensor],
        options: TextOptions,
        *,
        first_prompt: int = 0,
        decoder: PrefixDecoder | None = None,
    ) -> None:
        """prompts: of `encode_prompt`. first_prompt: index of prompts[0] among all, for the seeds of its texts.

        decoder: of the only prompt, if its beginning has been read before.
        """
        tokenizer, n_samples = loaded.tokenizer, options.samples
        model, prompts = loaded.begin(prompts)
        self._decoder = decoder or make_decoder(model, loaded.config.model)
        self._sampler = TextSampler(
            self._decoder,
            prompts,
            options.sampling,
            n_samples=n_samples,
            first_prompt=first_prompt,
            unpenalized=tokenizer.eos_id,
        )
        before = [prompt[-CONTEXT:].tolist() for prompt in prompts]
        rows = self._sampler.rows
        self._texts = {row: TextStream(tokenizer.decode, options.stop, before[row // n_samples]) for row in rows}
        self._n_tokens, self._eos_id, self._n_written = options.max_new_tokens, tokenizer.eos_id, 0
        self._limits = {row: _max_tokens(loaded, prompts[row // n_samples], self._n_tokens) for row in rows}

    @property
    def is_done(self) -> bool:
        return not self._sampler.rows

    def n_bytes(self) -> int:
        """Memory of the decoding state."""
        return self._decoder.n_bytes()

    def step(self) -> list[TextStep]:
        """Samples a token of each unfinished text; the first call reads the prompts. Raises UserError.

        Returns nothing while it reads the rest of a prompt whose beginning had been read before.
        """
        if isinstance(self._decoder, PrefixDecoder) and self._decoder.n_unread > READ_TOKENS:
            self._decoder.read(READ_TOKENS)
            return []
        self._n_written += 1
        steps = [self._add(row, token) for row, token in self._sampler.step().items()]
        self._sampler.finish({step.row for step in steps if step.end is not None})
        return steps

    def _add(self, row: int, token: int) -> TextStep:
        stream = self._texts[row]
        is_eos = token == self._eos_id
        text, end = "" if is_eos else stream.add(token), None
        if is_eos or stream.is_stopped:
            end = TextEnd.end_of_text if is_eos else TextEnd.stop_string
        elif self._n_written == self._limits[row]:
            end = TextEnd.max_new_tokens if self._n_written == self._n_tokens else TextEnd.max_positions
        return TextStep(row, text if end is None else text + stream.flush(), end)


def _search(
    loaded: LoadedModel, prompts: list[Tensor], options: TextOptions, search: BeamOptions, writer: TextWriter
) -> None:
    for number, prompt in enumerate(prompts):
        model, [prompt] = loaded.begin([prompt])
        limit, before = _max_tokens(loaded, prompt, options.max_new_tokens), prompt[-CONTEXT:].tolist()
        is_end = make_stop_check(loaded.tokenizer, before, options.stop)
        found = beam_search(make_decoder(model, loaded.config.model), prompt, limit, search, is_end)
        for sample in range(options.samples):
            row, is_cut = number * options.samples + sample, False
            if sample < len(found):
                text = TextStream(loaded.tokenizer.decode, options.stop, before)
                tokens = found[sample].tokens
                writer.write(row, "".join(map(text.add, tokens)) + text.flush())
                is_cut = len(tokens) == limit < options.max_new_tokens and not is_end(tokens)
            writer.end(row, is_cut=is_cut)


def make_stop_check(tokenizer: Tokenizer, before: list[int], stops: Sequence[str]) -> Callable[[list[int]], bool]:
    """Returns a function that checks whether a text ends with its last token. before: tokens that precede it."""
    # a stop string spans at most as many tokens as it has bytes
    tail = max((len(stop.encode()) for stop in stops), default=0) + 4

    def is_end(tokens: list[int]) -> bool:
        if tokens[-1] == tokenizer.eos_id or not stops:
            return tokens[-1] == tokenizer.eos_id
        text = TextStream(tokenizer.decode, stops, [*before, *tokens[:-tail]])
        for token in tokens[-tail:]:
            text.add(token)
        return text.is_stopped

    return is_end


def encode_prompt(loaded: LoadedModel, prompt: Prompt) -> Tensor:
    """Token ids [S] of the prompt after an end-of-text token, which precedes each document in training.

    Another one follows a prompt whose completion was a field of its own there. If documents did not see one
    another, the prompt is what follows its last end-of-text token. Raises ConfigError if it doesn't fit the model.
    """
    if loaded.config.task.kind is TaskKind.sequence_to_sequence and not prompt.text.strip():
        requirement = "it must contain the source of a sequence_to_sequence model"
        raise ConfigError(f"{prompt.name}: is empty; {requirement}")
    device = next(loaded.model.parameters()).device
    tokenizer, end = loaded.tokenizer, loaded.prompt_end
    ids = torch.tensor([tokenizer.eos_id, *tokenizer.encode(prompt.text).tolist(), *end], device=device)
    if loaded.config.data.mask_documents:
        ids = last_document(ids, tokenizer.eos_id)
    longest = loaded.config.model.max_positions
    if longest is not None and ids.numel() >= longest:
        raise ConfigError(
            f"{prompt.name}: has {ids.numel() - 1 - len(end)} tokens, and this model takes at most "
            f"{longest - 2 - len(end)}; "
            "shorten it, or train with more positions"
        )
    return ids


def _max_tokens(loaded: LoadedModel, prompt: Tensor, n_tokens: int) -> int:
    """Number of tokens to generate after a prompt [S]."""
    longest = loaded.config.model.max_positions
    return n_tokens if longest is None else min(n_tokens, longest - prompt.numel())
