"""Entry: text from a trained model. `reformer-generate RUN --prompt "..."`."""

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
from reformer_dist.generation.text_stream import CONTEXT
from reformer_dist.process.command import run_command
from reformer_dist.run.pretrained import LoadedModel, load_model

ROWS_AT_A_TIME = 16
SAMPLING = {"temperature": 0.8, "top_k": 0, "top_p": 0.95, "repetition_penalty": 1.0}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reformer-generate",
        description="Goes on with texts, printing as it writes.",
        epilog="example: reformer-generate outputs/quickstart --prompt 'def main('",
    )
    add = parser.add_argument
    add("run", type=Path, help="a run directory (its newest checkpoint) or a checkpoint")
    add("overrides", nargs="*", metavar="key=value", help="such as model.n_hashes=8")
    add("--prompt", action="append", default=[], metavar="TEXT", help="the text to go on from; may be repeated")
    add(
        "--prompt-file",
        action="append",
        default=[],
        metavar="FILE",
        help="a file whose whole text is a prompt, which is not printed again; - is standard input",
    )
    add("--max-new-tokens", type=int, default=200, metavar="N", help="tokens to write (default: 200)")
    add("--samples", type=int, default=1, metavar="N", help="texts to write for each prompt (default: 1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends a text before it; may be repeated")
    add("--temperature", type=float, metavar="T", help="0 always takes the likeliest token (default: 0.8)")
    add("--top-k", type=int, metavar="K", help="only the k likeliest tokens (default: 0, all)")
    add("--top-p", type=float, metavar="P", help="only the likeliest tokens up to this share (default: 0.95)")
    add("--repetition-penalty", type=float, metavar="X", help="above 1: fewer repetitions (default: 1)")
    add("--beams", type=int, metavar="N", help="beam search instead of sampling; prints the best texts")
    add(
        "--length-penalty", type=float, metavar="X", help="of beam search: above 1 favours long texts (default: 1)"
    )
    add("--seed", type=int, default=0, help="of the samples (default: 0)")
    return parser


@dataclass(frozen=True)
class Prompt:
    name: str
    """As errors call it."""
    text: bytes
    is_shown: bool


@dataclass(frozen=True)
class Request:
    """What the command line asks for, checked as far as it can be without a model."""

    prompts: list[Prompt]
    n_tokens: int
    n_samples: int
    stops: list[str]
    sampling: SamplingOptions
    beams: BeamOptions | None


def run_generation(arguments: argparse.Namespace) -> None:
    """Checks, loads and writes."""
    request = _request(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(arguments.run, arguments.overrides, device)
    if loaded.config.task.kind is TaskKind.sequence_to_sequence:
        request = _for_sources(request)
    prompts = [_encode(loaded, prompt, device) for prompt in request.prompts]
    writer = _Writer(request)
    if request.beams is not None:
        _search(loaded, prompts, request, request.beams, writer)
    else:
        size = max(1, ROWS_AT_A_TIME // request.n_samples)
        for first in range(0, len(prompts), size):
            _sample(loaded, prompts[first : first + size], first, request, writer)
    if writer.is_out_of_room:
        longest = loaded.config.model.max_positions
        sys.stderr.write(f"stopped: the model's positions end at {longest} tokens, prompt included\n")


class _Writer:
    """Prints texts one behind the other: the first that is not whole as it grows, later ones when it is."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._n_rows = len(request.prompts) * request.n_samples
        self._waiting = [""] * self._n_rows
        self._ended: set[int] = set()
        self._row = 0
        self.is_out_of_room = False
        self._begin()

    def write(self, row: int, text: str) -> None:
        if row != self._row:
            self._waiting[row] += text
        elif text:
            sys.stdout.write(text)
            sys.stdout.flush()

    def end(self, row: int) -> None:
        self._ended.add(row)
        while self._row in self._ended:
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
        self.write(self._row, self._waiting[self._row])


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
    limits = {row: _limit(loaded, prompts[row // n_samples], request.n_tokens) for row in sampler.rows}
    n_written = 0
    while sampler.rows:
        ended = set()
        n_written += 1
        for row, token in sampler.step().items():
            text, shown = texts[row], first * n_samples + row
            is_eos = token == tokenizer.eos_id
            writer.write(shown, "" if is_eos else text.add(token))
            if is_eos or text.is_stopped or n_written == limits[row]:
                writer.write(shown, text.flush())
                writer.end(shown)
                ended.add(row)
                writer.is_out_of_room |= not (is_eos or text.is_stopped) and n_written < request.n_tokens
        sampler.finish(ended)


def _search(
    loaded: LoadedModel, prompts: list[torch.Tensor], request: Request, options: BeamOptions, writer: _Writer
) -> None:
    for number, prompt in enumerate(prompts):
        model, [prompt] = loaded.begin([prompt])
        limit, before = _limit(loaded, prompt, request.n_tokens), prompt[-CONTEXT:].tolist()
        is_end = _ending(loaded.tokenizer, before, request.stops)
        found = beam_search(make_decoder(model, loaded.config.model), prompt, limit, options, is_end)
        for sample in range(request.n_samples):
            row = number * request.n_samples + sample
            if sample < len(found):
                text = TextStream(loaded.tokenizer.decode, request.stops, before)
                tokens = found[sample].tokens
                writer.write(row, "".join(map(text.add, tokens)) + text.flush())
                writer.is_out_of_room |= limit < request.n_tokens and len(tokens) == limit and not is_end(tokens)
            writer.end(row)


def _ending(tokenizer: Tokenizer, before: list[int], stops: list[str]) -> Callable[[list[int]], bool]:
    """Whether a text is over with its last token. before: tokens that it goes on from."""
    # as many tokens as a stop string can lie across, each of a byte
    tail = max((len(stop.encode()) for stop in stops), default=0) + 4

    def is_end(tokens: list[int]) -> bool:
        if tokens[-1] == tokenizer.eos_id or not stops:
            return tokens[-1] == tokenizer.eos_id
        text = TextStream(tokenizer.decode, stops, [*before, *tokens[:-tail]])
        for token in tokens[-tail:]:
            text.add(token)
        return text.is_stopped

    return is_end


def _request(arguments: argparse.Namespace) -> Request:
    for name, value in (("max-new-tokens", arguments.max_new_tokens), ("samples", arguments.samples)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: must be positive")
    if "" in arguments.stop:
        raise ConfigError("--stop '': must not be empty")
    prompts = [Prompt("--prompt", text.encode(errors="surrogateescape"), True) for text in arguments.prompt]
    prompts += [_read_prompt(name) for name in arguments.prompt_file]
    return Request(
        prompts or [Prompt("--prompt", b"", True)],
        arguments.max_new_tokens,
        arguments.samples,
        arguments.stop,
        _sampling(arguments),
        _beams(arguments),
    )


def _sampling(arguments: argparse.Namespace) -> SamplingOptions:
    given = {name: getattr(arguments, name) for name in SAMPLING if getattr(arguments, name) is not None}
    if given and arguments.beams is not None:
        option = next(iter(given)).replace("_", "-")
        raise ConfigError(f"--{option} {next(iter(given.values()))}: excludes --beams, which draws nothing")
    return SamplingOptions(**{**SAMPLING, **given}, seed=arguments.seed)


def _beams(arguments: argparse.Namespace) -> BeamOptions | None:
    length_penalty = arguments.length_penalty
    if arguments.beams is None:
        if length_penalty is not None:
            raise ConfigError(f"--length-penalty {length_penalty}: needs --beams")
        return None
    if arguments.samples > arguments.beams:
        raise ConfigError(f"--samples {arguments.samples}: must be at most --beams {arguments.beams}")
    return BeamOptions(arguments.beams, 1.0 if length_penalty is None else length_penalty)


def _read_prompt(name: str) -> Prompt:
    option = f"--prompt-file {name}"
    try:
        text = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(f"{option}: can't be read ({error.strerror})") from error
    if not text:
        raise ConfigError(f"{option}: is empty; it must hold the text to go on from")
    return Prompt(option, text, False)


def _for_sources(request: Request) -> Request:
    """What is written for a source is not its continuation: the source is not shown before it."""
    for prompt in request.prompts:
        if not prompt.text.strip():
            right = "it must hold the source that a sequence_to_sequence model writes for"
            raise ConfigError(f"{prompt.name}: is empty; {right}")
    return replace(request, prompts=[replace(prompt, is_shown=False) for prompt in request.prompts])


def _encode(loaded: LoadedModel, prompt: Prompt, device: torch.device) -> torch.Tensor:
    """Token ids [S] of an end-of-text token and the prompt: a document begins behind the end of another."""
    tokenizer = loaded.tokenizer
    ids = torch.tensor([tokenizer.eos_id, *tokenizer.encode(prompt.text).tolist()], device=device)
    longest = loaded.config.model.max_positions
    if longest is not None and ids.numel() >= longest:
        raise ConfigError(
            f"{prompt.name}: has {ids.numel() - 1} tokens, and this model takes at most {longest - 2}; "
            "shorten it, or train with longer positions"
        )
    return ids


def _limit(loaded: LoadedModel, prompt: torch.Tensor, n_tokens: int) -> int:
    """Tokens to write behind a prompt [S]."""
    longest = loaded.config.model.max_positions
    return n_tokens if longest is None else min(n_tokens, longest - prompt.numel())


def main() -> None:
    run_command(lambda: run_generation(build_parser().parse_intermixed_args()))


if __name__ == "__main__":
    main()
