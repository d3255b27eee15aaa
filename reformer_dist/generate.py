"""Entry: text from a trained model. `reformer-generate RUN --prompt "..."`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from reformer_dist.cli import run_command
from reformer_dist.errors import ConfigError
from reformer_dist.generation import SamplingOptions, generate
from reformer_dist.load import LoadedModel, load_model


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reformer-generate",
        description="Goes on with a text, printing as it writes.",
        epilog="example: reformer-generate outputs/quickstart --prompt 'def main('",
    )
    parser.add_argument("run", type=Path, help="a run directory (its newest checkpoint) or a checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.n_hashes=8")
    parser.add_argument("--prompt", default="", help="the text to go on from")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="tokens to write (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens; 0 means all")
    parser.add_argument("--top-p", type=float, default=0.95, help="only the likeliest tokens up to this share")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run_generation(arguments: argparse.Namespace) -> None:
    """Loads, checks and writes."""
    options = _sampling_options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(arguments.run, arguments.overrides, device)
    prompt = _encode_prompt(loaded, arguments.prompt)
    room = _room(loaded, prompt.numel())
    n_tokens = arguments.max_new_tokens if room is None else min(arguments.max_new_tokens, room)
    sys.stdout.write(arguments.prompt)
    n_written = _stream(loaded, generate(loaded.model, prompt.to(device), n_tokens, options))
    if n_written == n_tokens < arguments.max_new_tokens:
        longest = loaded.config.model.max_positions
        sys.stderr.write(f"stopped: the model's positions end at {longest} tokens, prompt included\n")


def _stream(loaded: LoadedModel, tokens: Iterator[int]) -> int:
    """Writes tokens as they come, up to the end of the text; returns how many it wrote."""
    ids: list[int] = []
    shown = 0
    for token in tokens:
        if token == loaded.tokenizer.eos_id:
            break
        ids.append(token)
        # a character may be spread over several tokens: it is shown when it is whole
        whole = loaded.tokenizer.decode(ids).rstrip("\ufffd")
        sys.stdout.write(whole[shown:])
        sys.stdout.flush()
        shown = max(shown, len(whole))
    sys.stdout.write(loaded.tokenizer.decode(ids)[shown:] + "\n")
    return len(ids)


def _sampling_options(arguments: argparse.Namespace) -> SamplingOptions:
    for name, value, fits, right in (
        ("max-new-tokens", arguments.max_new_tokens, arguments.max_new_tokens > 0, "must be positive"),
        ("temperature", arguments.temperature, arguments.temperature >= 0, "must not be negative"),
        ("top-k", arguments.top_k, arguments.top_k >= 0, "must not be negative"),
        ("top-p", arguments.top_p, 0 < arguments.top_p <= 1, "must be above 0 and at most 1"),
    ):
        if not fits:
            raise ConfigError(f"--{name} {value}: {right}")
    return SamplingOptions(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)


def _encode_prompt(loaded: LoadedModel, text: str) -> torch.Tensor:
    """Token ids [S] of an end-of-text token and the prompt: a document begins behind the end of another."""
    tokenizer = loaded.tokenizer
    ids = [tokenizer.eos_id, *tokenizer.encode(text.encode()).tolist()]
    room = _room(loaded, len(ids))
    if room is not None and room < 1:
        longest = loaded.config.model.max_positions
        raise ConfigError(
            f"--prompt: has {len(ids) - 1} tokens, and this model takes at most {(longest or 0) - 2}; "
            "shorten it, or train with longer positions"
        )
    return torch.tensor(ids)


def _room(loaded: LoadedModel, n_tokens: int) -> int | None:
    """Tokens that fit behind n_tokens; None for any number."""
    longest = loaded.config.model.max_positions
    return None if longest is None else longest - n_tokens


def main() -> None:
    run_command(lambda: run_generation(build_parser().parse_intermixed_args()))


if __name__ == "__main__":
    main()
