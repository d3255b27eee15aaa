"""reformer-generate: samples text from a trained model. `reformer-generate RUN --prompt "..."`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

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
from reformer_dist.process.command import run_command
from reformer_dist.run.pretrained import LoadedModel, add_weight_choice, load_model, weight_choice

MAX_BATCH = 16
SAMPLING = {"temperature": 0.8, "top_k": 0, "top_p": 0.95, "repetition_penalty": 1.0}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reformer-generate",
        description="Continues prompts, printing the text as it is sampled.",
        epilog="example: reformer-generate outputs/quickstart --prompt 'def main('",
    )
    add = parser.add_argument
    add("run", type=Path, help="a run directory (its newest checkpoint) or a checkpoint")
    add("overrides", nargs="*", metavar="key=value", help="such as model.n_hashes=8")
    add_weight_choice(parser)
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be repeated")
    prompt_file = "file whose text is a prompt, which is not printed; - is standard input; may be repeated"
    add("--prompt-file", action="append", default=[], metavar="FILE", help=prompt_file)
    add("--max-new-tokens", type=int, default=200, metavar="N", help="tokens to sample per text (default: 200)")
    add("--samples", type=int, default=1, metavar="N", help="texts per prompt (default: 1)")
    stop = "string that ends a text and is not printed; may be repeated"
    add("--stop", action="append", default=[], metavar="TEXT", help=stop)
    add("--temperature", type=float, metavar="T", help="0 always takes the most likely token (default: 0.8)")
    add("--top-k", type=int, metavar="K", help="sample from the k most likely tokens (default: 0, all)")
    top_p = "sample from the most likely tokens with this total probability (default: 0.95)"
    add("--top-p", type=float, metavar="P", help=top_p)
    add("--repetition-penalty", type=float, metavar="X", help="above 1: fewer repetitions (default: 1)")
    add(
        "--beams",
        type=int,
        metavar="N",
        help="beam search with N beams instead of sampling; prints the best texts",
    )
    add("--length-penalty", type=float, metavar="X", help="of beam search: above 1 favors long texts (default: 1)")
    add("--seed", type=int, default=0, help="random seed of sampling (default: 0)")
    return parser


@dataclass(frozen=True)
class Prompt:
    name: str
    """The option it comes from, for error messages."""
    text: bytes
    is_shown: bool


@dataclass(frozen=True)
class Request:
    """Options of the command line, validated as far as possible without a model."""

    prompts: list[Prompt]
    n_tokens: int
    n_samples: int
    stops: list[str]
    sampling: SamplingOptions
    beams: BeamOptions | None


def run_generation(arguments: argparse.Namespace) -> None:
    """Validates the options, loads the model and prints texts. Raises UserError."""
    request = _parse_request(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(arguments.run, arguments.overrides, device, weight_choice(arguments))
    if loaded.config.task.kind is TaskKind.sequence_to_sequence:
        request = _check_sources(request)
    prompts = [_encode(loaded, prompt, device) for prompt in request.prompts]
    writer = _Writer(request)
    if request.beams is not None:
        _search(loaded, prompts, request, request.beams, writer)
    else:
        size = max(1, MAX_BATCH // request.n_samples)
        for first in range(0, len(prompts), size):
            _sample(loaded, prompts[first : first + size], first, request, writer)
    if writer.hit_max_positions:
        longest = loaded.config.model.max_positions
        sys.stderr.write(f"stopped: the model has {longest} positions, prompt included\n")


class _Writer:
    """Prints texts in order: streams the first unfinished one and buffers later ones."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._n_rows = len(request.prompts) * request.n_samples
        self._buffered = [""] * self._n_rows
        self._finished: set[int] = set()
        self._row = 0
        self.hit_max_positions = False
        self._begin()

    def write(self, row: int, text: str) -> None:
        if row != self._row:
            self._buffered[row] += text
        elif text:
            sys.stdout.write(text)
            sys.stdout.flush()

    def end(self, row: int) -> None:
        self._finished.add(row)
        while self._row in self._finished:
            sys.stdout.write("\n")
            self._row += 1
            self._begin()

    def _begin(self) -> None:
        if self._row == self._n_rows:
            return
        number, sample = divmod(self._row, self._request.n_samples)
        if self._n_rows > 1:
            sys.stdout.write(f"==> prompt {number + 1}, text {sample + 1} <==\n")
        prompt = self._request.prompts[number]
        self.write(self._row, prompt.text.decode(errors="replace") if prompt.is_shown else "")
        self.write(self._row, self._buffered[self._row])


def _sample(
    loaded: LoadedModel, prompts: list[torch.Tensor], first: int, request: Request, writer: _Writer
) -> None:
    tokenizer, n_samples = loaded.tokenizer, request.n_samples
    model, prompts = loaded.begin(prompts)
    sampler = TextSampler(
        make_decoder(model, loaded.config.model),
        prompts,
        request.sampling,
        n_samples=n_samples,
        first_prompt=first,
        unpenalized=tokenizer.eos_id,
    )
    before = [prompt[-CONTEXT:].tolist() for prompt in prompts]
    texts = {row: TextStream(tokenizer.decode, request.stops, before[row // n_samples]) for row in sampler.rows}
    limits = {row: _max_tokens(loaded, prompts[row // n_samples], request.n_tokens) for row in sampler.rows}
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
                writer.end(output_row)
                ended.add(row)
                writer.hit_max_positions |= not (is_eos or text.is_stopped) and n_written < request.n_tokens
        sampler.finish(ended)


def _search(
    loaded: LoadedModel, prompts: list[torch.Tensor], request: Request, options: BeamOptions, writer: _Writer
) -> None:
    for number, prompt in enumerate(prompts):
        model, [prompt] = loaded.begin([prompt])
        limit, before = _max_tokens(loaded, prompt, request.n_tokens), prompt[-CONTEXT:].tolist()
        is_end = _make_stop_check(loaded.tokenizer, before, request.stops)
        beams = beam_search(make_decoder(model, loaded.config.model), prompt, limit, options, is_end)
        for sample in range(request.n_samples):
            row = number * request.n_samples + sample
            if sample < len(beams):
                text = TextStream(loaded.tokenizer.decode, request.stops, before)
                tokens = beams[sample].tokens
                writer.write(row, "".join(map(text.add, tokens)) + text.flush())
                is_cut = len(tokens) == limit and not is_end(tokens)
                writer.hit_max_positions |= is_cut and limit < request.n_tokens
            writer.end(row)


def _make_stop_check(tokenizer: Tokenizer, before: list[int], stops: list[str]) -> Callable[[list[int]], bool]:
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


def _parse_request(arguments: argparse.Namespace) -> Request:
    for name, value in (("max-new-tokens", arguments.max_new_tokens), ("samples", arguments.samples)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: must be positive")
    if "" in arguments.stop:
        raise ConfigError("--stop '': must not be empty")
    prompts = [Prompt("--prompt", text.encode(errors="surrogateescape"), True) for text in arguments.prompt]
    prompts += [_read_prompt(name) for name in arguments.prompt_file]
    options = {name: getattr(arguments, name) for name in SAMPLING if getattr(arguments, name) is not None}
    n_beams, length_penalty, beams = arguments.beams, arguments.length_penalty, None
    if n_beams is None and length_penalty is not None:
        raise ConfigError(f"--length-penalty {length_penalty}: needs --beams")
    if n_beams is not None:
        for name, value in options.items():
            raise ConfigError(f"--{name.replace('_', '-')} {value}: excludes --beams, which does not sample")
        if arguments.samples > n_beams:
            raise ConfigError(f"--samples {arguments.samples}: must be at most --beams {n_beams}")
        beams = BeamOptions(n_beams, 1.0 if length_penalty is None else length_penalty)
    return Request(
        prompts or [Prompt("--prompt", b"", True)],
        arguments.max_new_tokens,
        arguments.samples,
        arguments.stop,
        SamplingOptions(**{**SAMPLING, **options}, seed=arguments.seed),
        beams,
    )


def _read_prompt(name: str) -> Prompt:
    option = f"--prompt-file {name}"
    try:
        text = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(f"{option}: can't be read ({error.strerror})") from error
    if not text:
        raise ConfigError(f"{option}: is empty; it must contain the text to continue")
    return Prompt(option, text, False)


def _check_sources(request: Request) -> Request:
    """Checks prompts that are sources, and hides them, since the output does not continue them."""
    for prompt in request.prompts:
        if not prompt.text.strip():
            requirement = "it must contain the source of a sequence_to_sequence model"
            raise ConfigError(f"{prompt.name}: is empty; {requirement}")
    return replace(request, prompts=[replace(prompt, is_shown=False) for prompt in request.prompts])


def _encode(loaded: LoadedModel, prompt: Prompt, device: torch.device) -> torch.Tensor:
    """Token ids [S] of the prompt after an end-of-text token, which precedes each document in training.

    If documents did not see one another there, the prompt is what follows its last end-of-text token.
    """
    tokenizer = loaded.tokenizer
    ids = torch.tensor([tokenizer.eos_id, *tokenizer.encode(prompt.text).tolist()], device=device)
    if loaded.config.data.mask_documents:
        ids = last_document(ids, tokenizer.eos_id)
    longest = loaded.config.model.max_positions
    if longest is not None and ids.numel() >= longest:
        raise ConfigError(
            f"{prompt.name}: has {ids.numel() - 1} tokens, and this model takes at most {longest - 2}; "
            "shorten it, or train with more positions"
        )
    return ids


def _max_tokens(loaded: LoadedModel, prompt: torch.Tensor, n_tokens: int) -> int:
    """Number of tokens to sample after a prompt [S]."""
    longest = loaded.config.model.max_positions
    return n_tokens if longest is None else min(n_tokens, longest - prompt.numel())


def main() -> None:
    run_command(lambda: run_generation(build_parser().parse_intermixed_args()))


if __name__ == "__main__":
    main()
