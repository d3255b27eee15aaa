"""reformer-generate: samples text from a trained model. `reformer-generate RUN --prompt "..."`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from reformer_dist.config import TaskKind
from reformer_dist.errors import ConfigError
from reformer_dist.inference.continuation import Prompt, TextOptions, generate_texts, text_options
from reformer_dist.process.command import run_command
from reformer_dist.process.version import add_version
from reformer_dist.run.pretrained import add_weight_choice, load_model, weight_choice

OPTIONS = (
    *("max_new_tokens", "samples", "stop", "temperature", "top_k", "top_p", "repetition_penalty", "beams"),
    *("length_penalty", "seed"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reformer-generate",
        description="Continues prompts, printing the text as it is sampled.",
        epilog="example: reformer-generate outputs/quickstart --prompt 'def main('",
    )
    add_version(parser)
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


def run_generation(arguments: argparse.Namespace) -> None:
    """Validates the options, loads the model and prints texts. Raises UserError."""
    options = text_options(**{name: getattr(arguments, name) for name in OPTIONS})
    prompts = [Prompt("--prompt", text.encode(errors="surrogateescape")) for text in arguments.prompt]
    n_shown = len(prompts)
    prompts += [_read_prompt(name) for name in arguments.prompt_file]
    if not prompts:
        prompts, n_shown = [Prompt("--prompt", b"")], 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(arguments.run, arguments.overrides, device, weight_choice(arguments))
    if loaded.config.task.kind is TaskKind.sequence_to_sequence or loaded.prompt_end:
        n_shown = 0  # a target does not continue its source, nor a completion the text of its prompt
    writer = _Writer([prompt.text if number < n_shown else b"" for number, prompt in enumerate(prompts)], options)
    generate_texts(loaded, prompts, options, writer)
    if writer.hit_max_positions:
        longest = loaded.config.model.max_positions
        sys.stderr.write(f"stopped: the model has {longest} positions, prompt included\n")


class _Writer:
    """Prints texts in order: streams the first unfinished one and buffers later ones."""

    def __init__(self, shown: list[bytes], options: TextOptions) -> None:
        """shown: what is printed before the texts of each prompt."""
        self._shown, self._n_samples = shown, options.samples
        self._n_rows = len(shown) * options.samples
        self._buffered = [""] * self._n_rows
        self._finished: set[int] = set()
        self._row = 0
        self._has_begun = False
        self.hit_max_positions = False

    def write(self, row: int, text: str) -> None:
        if not self._has_begun:  # by now the prompts are known to fit: an error would follow the text of one
            self._has_begun = True
            self._begin()
        if row != self._row:
            self._buffered[row] += text
        elif text:
            sys.stdout.write(text)
            sys.stdout.flush()

    def end(self, row: int, *, is_cut: bool) -> None:
        self.hit_max_positions |= is_cut
        self.write(row, "")
        self._finished.add(row)
        while self._row in self._finished:
            sys.stdout.write("\n")
            self._row += 1
            self._begin()

    def _begin(self) -> None:
        if self._row == self._n_rows:
            return
        number, sample = divmod(self._row, self._n_samples)
        if self._n_rows > 1:
            sys.stdout.write(f"==> prompt {number + 1}, text {sample + 1} <==\n")
        self.write(self._row, self._shown[number].decode(errors="replace"))
        self.write(self._row, self._buffered[self._row])


def _read_prompt(name: str) -> Prompt:
    option = f"--prompt-file {name}"
    try:
        text = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(f"{option}: can't be read ({error.strerror})") from error
    if not text:
        raise ConfigError(f"{option}: is empty; it must contain the text to continue")
    return Prompt(option, text)


def main() -> None:
    run_command(lambda: run_generation(build_parser().parse_intermixed_args()))


if __name__ == "__main__":
    main()
