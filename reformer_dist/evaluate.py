"""reformer-evaluate: loss and task metrics of a trained model. `reformer-evaluate RUN [key=value ...]`."""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reformer_dist.config import TaskKind
from reformer_dist.data import IGNORE_INDEX, SPLITS, Corpus, RowSelection, heldout_text_batches
from reformer_dist.distributed import failures, runtime
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import ConfigError, DataError
from reformer_dist.models.sequence import WholeSequence
from reformer_dist.ops.lsh.attention import Exchange, LocalExchange
from reformer_dist.ops.lsh.coverage import Coverage, measure_coverage
from reformer_dist.ops.lsh.shared_keys import shared_keys
from reformer_dist.parallel.sequence import make_sequence
from reformer_dist.process.command import run_command
from reformer_dist.run.data import open_corpus
from reformer_dist.run.pretrained import LoadedModel, load_model
from reformer_dist.tasks.text_metrics import gzip_bits_per_byte, order0_bits_per_byte
from reformer_dist.training.evaluation import EvalResult, evaluate

MICRO_BATCH = 8


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reformer-evaluate",
        description="Evaluates a trained model on held-out data: the loss, and the metrics of its task.",
        epilog="example: reformer-evaluate outputs/quickstart --rows 200 model.n_hashes=8",
    )
    add = parser.add_argument
    add("run", type=Path, help="a run directory (its newest checkpoint) or a checkpoint")
    add("overrides", nargs="*", metavar="key=value", help="such as model.n_hashes=8 or data.path=...")
    add(
        "--rows",
        type=int,
        default=0,
        help="number of rows, spread evenly over the split; 0, the default, means all",
    )
    add("--batch", type=int, default=MICRO_BATCH, help=f"rows per batch (default: {MICRO_BATCH})")
    add("--split", choices=SPLITS, default="heldout", help="heldout, or train for tasks that read samples")
    add("--rounds", metavar="N,N,...", help="print a table over numbers of hash rounds, such as 1,2,4,8")
    coverage = "instead of the loss, the fraction of exact attention's softmax mass that each LSH layer covers"
    add("--coverage", action="store_true", help=coverage)
    add("--output", type=Path, help="with --coverage: JSON file to write the result to")
    return parser


def run_evaluation(arguments: argparse.Namespace) -> None:
    """Evaluates as one rank of the job; rank 0 prints. Raises UserError on every rank."""
    job = runtime.start()
    with failures.detect_lost_ranks(job):
        if arguments.coverage:
            lines = _coverage(arguments, job)
        else:
            lines = _rounds_table(arguments, job) if arguments.rounds else _report(arguments, job)
        if job.is_main:
            print("\n".join(lines))


def _report(arguments: argparse.Namespace, job: Runtime) -> list[str]:
    loaded, corpus = _open(arguments, [], job)
    result = _evaluate(arguments, loaded, corpus, job)
    rows = _describe_rows(arguments, loaded, corpus)
    lines = [f"checkpoint: {loaded.checkpoint}"]
    if loaded.config.task.kind is TaskKind.language_model:
        text = _heldout_text(arguments, loaded, corpus)  # for the baselines
        return [
            *lines,
            f"held-out text: {result.text_bytes:,} bytes, {result.n_labels:,} tokens, {rows}",
            f"held-out loss: {result.loss:.4f} nats per token",
            f"held-out bits per byte: {result.bits_per_byte:.4f}",
            f"  order-0 entropy of the same text: {order0_bits_per_byte(text):.4f}",
            f"  gzip -9 of the same text: {gzip_bits_per_byte(text):.4f}",
        ]
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
    return lines + loaded.task.measure(loaded.model, corpus, selected, all_gather)


def _rounds_table(arguments: argparse.Namespace, job: Runtime) -> list[str]:
    lines: list[str] = []
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
    return lines


def _open(arguments: argparse.Namespace, overrides: list[str], job: Runtime) -> tuple[LoadedModel, Corpus]:
    if arguments.batch < 1 or arguments.rows < 0:
        raise ConfigError(f"--batch {arguments.batch} --rows {arguments.rows}: must be at least 1 and 0")
    loaded = job.together(lambda: load_model(arguments.run, [*arguments.overrides, *overrides], job.device))
    return loaded, job.together(lambda: _open_corpus(loaded, arguments.split))


def _open_corpus(loaded: LoadedModel, split: str) -> Corpus:
    corpus = open_corpus(loaded.config.data, [split])
    with tempfile.TemporaryDirectory() as folder:
        specifications = [tokenizer.save(Path(folder)) for tokenizer in (corpus.tokenizer, loaded.tokenizer)]
    if specifications[0] != specifications[1]:
        fix = f"write the data with tools/make_shards.py --tokenizer-of {loaded.checkpoint}"
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
    return evaluate(loaded.model, batches, task, job, sequence)


def _heldout_text(arguments: argparse.Namespace, loaded: LoadedModel, corpus: Corpus) -> bytes:
    """The text of all labels."""
    batches = loaded.task.heldout(corpus, _select_rows(arguments, loaded, 0, 1))
    ids = torch.cat([batch["labels"][batch["labels"] != IGNORE_INDEX] for batch in batches])
    return loaded.tokenizer.decode_bytes(ids.numpy())


class CoverageSequence(WholeSequence):
    """Measures the coverage of each LSH layer during a forward, which it does not change."""

    def __init__(self) -> None:
        self.layers: list[Coverage] = []
        """Coverage of each LSH layer, in order."""

    def bucket_attention(self, q: Tensor, k: Tensor | None, v: Tensor, exchange: Exchange) -> Tensor:
        assert isinstance(exchange, LocalExchange)
        if k is None:  # separate keys are those of local attention, which does not hash
            ids, options, mask = exchange.bucket_ids, exchange.options, exchange.key_padding_mask
            self.layers.append(measure_coverage(q, shared_keys(q), ids, options, mask))
        return super().bucket_attention(q, k, v, exchange)


@torch.no_grad()
def _measure_layers(loaded: LoadedModel, corpus: Corpus, n_rows: int) -> list[dict[str, float]]:
    """Coverage of each LSH layer over held-out rows, averaged over heads. Raises UserError."""
    device = next(loaded.model.parameters()).device
    totals: list[Coverage] = []
    data = loaded.config.data
    rows = RowSelection(n_rows, max_damaged_fraction=data.max_damaged_fraction)
    for batch in heldout_text_batches(corpus, rows, seq_len=data.seq_len):
        sequence = CoverageSequence()
        tokens, labels = batch["tokens"].to(device), batch["labels"].to(device)
        loaded.language_model(tokens, labels, key_padding_mask=labels != IGNORE_INDEX, sequence=sequence)
        totals = totals or [Coverage() for _ in sequence.layers]
        for total, layer in zip(totals, sequence.layers, strict=True):
            total.add(layer)
    return [total.fractions() for total in totals]


def _coverage(arguments: argparse.Namespace, job: Runtime) -> list[str]:
    """A line per LSH layer; rank 0 also writes them to `--output` as JSON. Raises UserError."""
    loaded = load_model(arguments.run, arguments.overrides, job.device)
    model = loaded.config.model
    if model.compat.chunk_wrap:
        reason = "coverage is not defined for chunks that wrap into other rounds"
        raise ConfigError(f"model.compat.chunk_wrap=true: {reason}")
    corpus = open_corpus(loaded.config.data, ["heldout"])
    layers = _measure_layers(loaded, corpus, arguments.rows)
    if not layers:
        raise ConfigError(f"model.layers={[kind.name for kind in model.layers]}: none of them is lsh")
    mean = {name: sum(layer[name] for layer in layers) / len(layers) for name in layers[0]}
    if arguments.output is not None and job.is_main:
        arguments.output.write_text(json.dumps({**mean, "layers": layers}, indent=1) + "\n")
    lines = [f"held-out text: {_describe_rows(arguments, loaded, corpus)}"]
    lines += [f"LSH layer {number}: {_fractions(layer)}" for number, layer in enumerate(layers)]
    return [*lines, f"mean: {_fractions(mean)}"]


def _fractions(fractions: dict[str, float]) -> str:
    return f"{fractions['mass']:.4f} of the softmax mass on {fractions['pairs']:.4f} of the pairs"


def main() -> None:
    run_command(lambda: run_evaluation(build_parser().parse_intermixed_args()))


if __name__ == "__main__":
    main()
