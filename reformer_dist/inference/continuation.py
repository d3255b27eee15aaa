"""Texts that continue prompts, or the targets of sources, by sampling or beam search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from reformer_dist.generation.decoder import last_document
from reformer_dist.generation.text_stream import CONTEXT
from reformer_dist.run.pretrained import LoadedModel

MAX_BATCH = 16
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
    if loaded.config.task.kind is TaskKind.sequence_to_sequence:
        _check_sources(prompts)
    device = next(loaded.model.parameters()).device
    encoded = [_encode(loaded, prompt, device) for prompt in prompts]
    if options.beams is not None:
        _search(loaded, encoded, options, options.beams, writer)
        return
    size = max(1, MAX_BATCH // options.samples)
    for first in range(0, len(encoded), size):
        _sample(loaded, encoded[first : first + size], first, options, writer)


def _sample(
    loaded: LoadedModel, prompts: list[Tensor], first: int, options: TextOptions, writer: TextWriter
) -> None:
    tokenizer, n_samples = loaded.tokenizer, options.samples
    model, prompts = loaded.begin(prompts)
    sampler = TextSampler(
        make_decoder(model, loaded.config.model),
        prompts,
        options.sampling,
        n_samples=n_samples,
        first_prompt=first,
        unpenalized=tokenizer.eos_id,
    )
    before = [prompt[-CONTEXT:].tolist() for prompt in prompts]
    texts = {row: TextStream(tokenizer.decode, options.stop, before[row // n_samples]) for row in sampler.rows}
    n_tokens = options.max_new_tokens
    limits = {row: _max_tokens(loaded, prompts[row // n_samples], n_tokens) for row in sampler.rows}
    n_written = 0
    while sampler.rows:
        ended = set()
        n_written += 1
        for row, token in sampler.step().items():
            text, output_row = texts[row], first * n_samples + row
            is_eos = token == tokenizer.eos_id
            writer.write(output_row, "" if is_eos else text.add(token))
            if is_eos or text.is_stopped or n_written == limits[row]:
                writer.write(output_row, text.flush())
                writer.end(output_row, is_cut=not (is_eos or text.is_stopped) and n_written < n_tokens)
                ended.add(row)
        sampler.finish(ended)


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


def _check_sources(prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        if not prompt.text.strip():
            requirement = "it must contain the source of a sequence_to_sequence model"
            raise ConfigError(f"{prompt.name}: is empty; {requirement}")


def _encode(loaded: LoadedModel, prompt: Prompt, device: torch.device) -> Tensor:
    """Token ids [S] of the prompt after an end-of-text token, which precedes each document in training.

    Another one follows a prompt whose completion was a field of its own there. If documents did not see one
    another, the prompt is what follows its last end-of-text token.
    """
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
