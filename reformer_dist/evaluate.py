"""reformer-evaluate: loss and task metrics of a trained model. `reformer-evaluate RUN [key=value ...]`."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from reformer_dist.config import TaskKind
from reformer_dist.data import IGNORE_INDEX, SPLITS, Corpus, RowSelection
from reformer_dist.diagnostics.context_windows import cut_rows
from reformer_dist.diagnostics.coverage import measure_layers
from reformer_dist.diagnostics.knockout import remove_attention
from reformer_dist.diagnostics.needles import measure_needles, needle_table, plot_needles
from reformer_dist.distributed import failures, runtime
from reformer_dist.distributed.runtime import Runtime, is_rank
from reformer_dist.errors import ConfigError, DataError
from reformer_dist.fs.atomic import write_atomic
from reformer_dist.launch.choice import take_local_launcher
from reformer_dist.launch.local import run_ranks
from reformer_dist.models.base import ReformerModel
from reformer_dist.parallel.sequence import make_sequence
from reformer_dist.process import log
from reformer_dist.process.command import run_command
from reformer_dist.process.live_line import live
from reformer_dist.process.log import logger
from reformer_dist.process.version import add_version
from reformer_dist.run.data import open_corpus
from reformer_dist.run.pretrained import LoadedModel, add_weight_choice, load_model, weight_choice
from reformer_dist.tasks.text_metrics import gzip_bits_per_byte, order0_bits_per_byte
from reformer_dist.training.evaluation import EvalResult, evaluate

Report = tuple[dict[str, Any], list[str]]
"""JSON values, and the lines to print."""
Mode = Callable[[argparse.Namespace, Runtime], Report]
"""Evaluates as one rank."""
MICRO_BATCH = 8
PRECISION = "float32"  # of weights and activations, whatever the model was trained in
NEEDLES_PER_CELL = 10
LARGEST_EXPONENT = 700.0  # of a finite perplexity
MIN_NEEDLE_BYTES = 100


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reformer-evaluate",
        description="Evaluates a trained model on held-out data: the loss, and the metrics of its task.",
        epilog="examples: reformer-evaluate outputs/quickstart --rows 200 model.n_hashes=8, "
        "and on two ranks with launcher=local launcher.nproc_per_node=2 (parallel.sequence=2)",
    )
    add_version(parser)
    add = parser.add_argument
    add("run", type=Path, help="a run directory (its newest checkpoint) or a checkpoint")
    add("overrides", nargs="*", metavar="key=value", help="such as model.n_hashes=8 or data.path=...")
    add_weight_choice(parser)
    add(
        "--rows",
        type=int,
        default=0,
        help="number of rows, spread evenly over the split; 0, the default, means all",
    )
    add("--batch", type=int, default=MICRO_BATCH, help=f"rows per batch (default: {MICRO_BATCH})")
    add("--split", choices=SPLITS, default="heldout", help="heldout, or train for tasks that read samples")
    add("--by-position", action="store_true", help="also print the loss by the position of a token in its row")
    add("--without", metavar="LAYERS", help="remove the attention of lsh, local or exact layers, or of 0,1,...")
    modes = parser.add_argument_group("instead of the loss").add_mutually_exclusive_group()
    add = modes.add_argument
    add("--rounds", metavar="N,N,...", help="a table over numbers of hash rounds, such as 1,2,4,8")
    add("--context", metavar="N,N,...", help="a table over the tokens that each may look back over: 256,1k,4k")
    needles = f"a table over bytes of text with a hidden number; --rows per cell (default: {NEEDLES_PER_CELL})"
    add("--needles", metavar="N,N,...", help=needles)
    coverage = "the fraction of exact attention's softmax mass that each LSH layer covers"
    add("--coverage", action="store_true", help=coverage)
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="with --needles: write a heat map")
    return parser


def run_evaluation(arguments: argparse.Namespace) -> None:
    """Evaluates as a rank of the job, of which rank 0 prints, or starts its ranks. Raises UserError on each."""
    launcher, arguments.overrides = take_local_launcher("reformer-evaluate", arguments.overrides)
    if launcher is not None and not is_rank():
        sys.exit(run_ranks("reformer_dist.evaluate", sys.argv[1:], launcher, "run the same command again"))
    if arguments.json:
        log.configure(sys.stderr)
    job = runtime.start()
    with failures.detect_lost_ranks(job):
        print_report(arguments, job)


def print_report(arguments: argparse.Namespace, job: Runtime) -> None:
    """Evaluates; rank 0 prints the result and writes it to --output. Raises UserError on every rank."""
    with live.shown(), live.phase("evaluating"):
        values, lines = _mode(arguments)(arguments, job)
    document = json.dumps({"precision": PRECISION, **values}, indent=1)
    if arguments.output is not None:
        job.on_main(lambda: write_atomic(arguments.output, f"{document}\n"))
    if job.is_main:
        print(document if arguments.json else "\n".join(lines))


def _mode(arguments: argparse.Namespace) -> Mode:
    """The report that the options ask for. Raises ConfigError if they do not go together."""
    modes: tuple[tuple[Any, Mode], ...] = (
        (arguments.rounds, _rounds_table),
        (arguments.context, _context_table),
        (arguments.needles, _needles),
        (arguments.coverage, _coverage),
    )
    mode = next((mode for option, mode in modes if option), _report)
    if arguments.by_position and mode is not _report:
        raise ConfigError("--by-position: breaks down the loss, which --rounds, --context and the like replace")
    if arguments.plot is not None and mode is not _needles:
        raise ConfigError(f"--plot {arguments.plot}: needs --needles")
    return mode


def _report(arguments: argparse.Namespace, job: Runtime) -> Report:
    loaded, corpus = _open(arguments, [], job)
    result = _evaluate(arguments, loaded, corpus, job)
    rows = _describe_rows(arguments, loaded, corpus)
    values: dict[str, Any] = {**result.values(), "by_position": [asdict(each) for each in result.positions]}
    lines = [f"checkpoint: {loaded.checkpoint}", f"precision: {PRECISION}"]
    if loaded.config.task.kind is TaskKind.language_model:
        lines.append(f"held-out text: {result.text_bytes:,} bytes, {result.n_labels:,} tokens, {rows}")
        values["perplexity"] = math.exp(min(result.loss, LARGEST_EXPONENT))
        lines.append(f"held-out loss: {result.loss:.4f} nats per token")
        lines.append(f"held-out perplexity: {values['perplexity']:.3f} per token")
        if result.bits_per_byte is not None:
            text = _heldout_text(arguments, loaded, corpus)  # for the baselines
            order0, gzip = order0_bits_per_byte(text), gzip_bits_per_byte(text)
            values |= {"order0_bits_per_byte": order0, "gzip_bits_per_byte": gzip}
            lines.append(f"held-out bits per byte: {result.bits_per_byte:.4f}")
            lines.append(f"  order-0 entropy of the same text: {order0:.4f}")
            lines.append(f"  gzip -9 of the same text: {gzip:.4f}")
        return values, [*lines, *_position_lines(result)]
    split = "held-out" if arguments.split == "heldout" else "training"
    lines.append(f"task: {loaded.config.task.kind.name}")
    lines.append(f"{split} loss: {result.loss:.4f} nats per label, {result.n_labels:,} labels, {rows}")
    if result.bits_per_byte is not None:
        lines.append(f"{split} bits per byte: {result.bits_per_byte:.4f}")
    if result.accuracy is not None:
        lines.append(f"{split} accuracy: {100 * result.accuracy:.2f} %")

    def all_gather(local: list[Any]) -> list[Any]:
        return list(chain.from_iterable(job.gather(local)))

    selected = _select_rows(arguments, loaded, job.rank, job.world_size)
    measures = loaded.task.measure(loaded.model, corpus, selected, all_gather)
    return {**values, "task": measures.values}, lines + measures.lines


def _position_lines(result: EvalResult) -> list[str]:
    if not result.positions:
        return []
    metric = "loss" if result.bits_per_byte is None else "bits per byte"
    parts = zip(result.position_values().items(), result.positions, strict=True)
    lines = [f"{name:>16} {value:10.4f}  of {part.n_labels:,} tokens" for (name, value), part in parts]
    return [f"held-out {metric} by position in the row:", *lines]


def _rounds_table(arguments: argparse.Namespace, job: Runtime) -> Report:
    lines: list[str] = []
    results: dict[str, dict[str, float]] = {}
    numbers = arguments.rounds.split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        requirement = "must be positive numbers separated by commas, such as 1,2,4,8"
        raise ConfigError(f"--rounds {arguments.rounds}: {requirement}")
    for rounds in map(int, numbers):
        loaded, corpus = _open(arguments, [f"model.n_hashes={rounds}"], job)
        values = _evaluate(arguments, loaded, corpus, job).values()
        if not lines:
            lines = [f"checkpoint: {loaded.checkpoint}", _describe_rows(arguments, loaded, corpus)]
            lines.append("".join(f"{name:>16}" for name in ("rounds", *values)))
        lines.append(f"{rounds:>16}" + "".join(f"{value:>16.4f}" for value in values.values()))
        results[str(rounds)] = values
    return {"rounds": results}, lines


def _open(arguments: argparse.Namespace, overrides: list[str], job: Runtime) -> tuple[LoadedModel, Corpus]:
    if arguments.batch < 1 or arguments.rows < 0:
        raise ConfigError(f"--batch {arguments.batch} --rows {arguments.rows}: must be at least 1 and 0")
    words, choice = [*arguments.overrides, *overrides], weight_choice(arguments)
    loaded = job.together(lambda: load_model(arguments.run, words, job.device, choice))
    if arguments.without is not None:
        if not isinstance(loaded.model, ReformerModel):
            raise ConfigError(f"--without {arguments.without}: needs a model of one stack of layers")
        removed = remove_attention(loaded.model, arguments.without)
        logger.info(f"without the attention of layers {', '.join(map(str, removed))}")
    return loaded, job.together(lambda: _open_corpus(loaded, arguments.split))


def _open_corpus(loaded: LoadedModel, split: str) -> Corpus:
    corpus = open_corpus(loaded.config.data, [split])
    with tempfile.TemporaryDirectory() as folder:
        specifications = [tokenizer.save(Path(folder)) for tokenizer in (corpus.tokenizer, loaded.tokenizer)]
    if specifications[0] != specifications[1]:
        fix = f"write the data with reformer-shards --tokenizer-of {loaded.checkpoint}"
        raise DataError(f"data.path={corpus.where}: has another tokenizer than the model; {fix}")
    loaded.task.check(corpus)
    return corpus


def _select_rows(arguments: argparse.Namespace, loaded: LoadedModel, rank: int, size: int) -> RowSelection:
    if arguments.split != "heldout" and loaded.config.task.packs_text:
        raise ConfigError(
            f"--split {arguments.split}: needs a task that reads samples; packed text is evaluated on heldout"
        )
    max_damaged = loaded.config.data.max_damaged_fraction
    return RowSelection(arguments.rows, arguments.batch, rank, size, max_damaged, arguments.split)


def _describe_rows(arguments: argparse.Namespace, loaded: LoadedModel, corpus: Corpus) -> str:
    return _select_rows(arguments, loaded, 0, 1).describe(loaded.task.count_rows(corpus, arguments.split))


def _evaluate(arguments: argparse.Namespace, loaded: LoadedModel, corpus: Corpus, job: Runtime) -> EvalResult:
    sequence = make_sequence(loaded.config, job, arguments.batch)
    task, mesh = loaded.task, sequence.mesh
    batches = task.heldout(corpus, _select_rows(arguments, loaded, mesh.dp_rank, mesh.dp_size))
    is_text = loaded.config.task.kind is TaskKind.language_model
    if arguments.by_position and not is_text:
        raise ConfigError(f"--by-position: needs task.kind=language_model; this is {loaded.config.task.kind.name}")
    return evaluate(loaded.model, batches, task, job, sequence, by_position=arguments.by_position)


def _heldout_text(arguments: argparse.Namespace, loaded: LoadedModel, corpus: Corpus) -> bytes:
    """The text of all labels."""
    batches = loaded.task.heldout(corpus, _select_rows(arguments, loaded, 0, 1))
    ids = torch.cat([batch["labels"][batch["labels"] != IGNORE_INDEX] for batch in batches])
    return loaded.tokenizer.decode_bytes(ids.numpy())


def _coverage(arguments: argparse.Namespace, job: Runtime) -> Report:
    """A line per LSH layer. Raises UserError."""
    loaded, corpus = _open_text(arguments, "--coverage", job)
    rows = RowSelection(arguments.rows, max_damaged_fraction=loaded.config.data.max_damaged_fraction)
    batches = loaded.task.heldout(corpus, rows)
    layers = measure_layers(loaded.language_model, batches)
    mean = {name: sum(layer[name] for layer in layers) / len(layers) for name in layers[0]}
    lines = [f"held-out text: {_describe_rows(arguments, loaded, corpus)}"]
    lines += [f"LSH layer {number}: {_fractions(layer)}" for number, layer in enumerate(layers)]
    return {**mean, "layers": layers}, [*lines, f"mean: {_fractions(mean)}"]


def _fractions(fractions: dict[str, float]) -> str:
    return f"{fractions['mass']:.4f} of the softmax mass on {fractions['pairs']:.4f} of the pairs"


def _context_table(arguments: argparse.Namespace, job: Runtime) -> Report:
    """The loss of the same tokens for each number of tokens that they may look back over."""
    loaded, corpus = _open_text(arguments, "--context", job)
    seq_len, results = loaded.config.data.seq_len, {}
    for context in parse_sizes("--context", arguments.context, least=1, most=seq_len):
        sequence = make_sequence(loaded.config, job, arguments.batch)
        mesh = sequence.mesh
        rows = loaded.task.heldout(corpus, _select_rows(arguments, loaded, mesh.dp_rank, mesh.dp_size))
        windows = cut_rows(rows, context, arguments.batch)
        results[context] = evaluate(loaded.model, windows, loaded.task, job, sequence)
    values = {str(context): result.values() for context, result in results.items()}
    lines = [f"checkpoint: {loaded.checkpoint}", f"held-out text: {_describe_rows(arguments, loaded, corpus)}"]
    lines.append("".join(f"{name:>16}" for name in ("context", *next(iter(results.values())).values())))
    for context, result in results.items():
        lines.append(f"{context:>16,}" + "".join(f"{value:>16.4f}" for value in result.values().values()))
    return {"context": values}, lines


def _needles(arguments: argparse.Namespace, job: Runtime) -> Report:
    loaded, corpus = _open_text(arguments, "--needles", job)
    most = loaded.config.model.max_positions or 1 << 24  # a token has at least one byte
    lengths = parse_sizes("--needles", arguments.needles, least=MIN_NEEDLE_BYTES, most=most)
    text = _heldout_text(argparse.Namespace(**{**vars(arguments), "rows": 0}), loaded, corpus)
    n_samples = arguments.rows or NEEDLES_PER_CELL
    cells = measure_needles(loaded.language_model, loaded.tokenizer, text, lengths, n_samples)
    if arguments.plot is not None:
        job.on_main(lambda: plot_needles(cells, arguments.plot))
    values = {"needles": [asdict(cell) for cell in cells], "samples": n_samples}
    return values, [f"checkpoint: {loaded.checkpoint}", f"{n_samples} needles per cell", *needle_table(cells)]


def _open_text(arguments: argparse.Namespace, option: str, job: Runtime) -> tuple[LoadedModel, Corpus]:
    """Raises ConfigError unless the model predicts the next token of text."""
    loaded, corpus = _open(arguments, [], job)
    if loaded.config.task.kind is not TaskKind.language_model:
        raise ConfigError(f"{option}: needs task.kind=language_model; this is {loaded.config.task.kind.name}")
    return loaded, corpus


def parse_sizes(option: str, value: str, *, least: int, most: int) -> list[int]:
    """The numbers in a list such as 256,1k,16k. Raises ConfigError if one is not from `least` to `most`."""
    sizes = []
    for word in value.lower().split(","):
        digits, unit = word.removesuffix("k"), 1024 if word.endswith("k") else 1
        size = int(digits) * unit if digits.isdecimal() else 0
        if not least <= size <= most:
            expected = f"must be from {least} to {most:,}, such as 256,1k,16k"
            raise ConfigError(f"{option} {value}: {word!r} {expected}")
        sizes.append(size)
    return sizes


def main() -> None:
    run_command(lambda: run_evaluation(build_parser().parse_intermixed_args()))


if __name__ == "__main__":
    main()
