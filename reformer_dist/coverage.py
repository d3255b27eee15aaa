"""Entry: what of exact attention a trained model finds. `python -m reformer_dist.coverage RUN [key=value ...]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reformer_dist.cli import run_command
from reformer_dist.data import IGNORED_LABEL, heldout_batches
from reformer_dist.distributed import runtime
from reformer_dist.errors import ConfigError
from reformer_dist.feed import open_corpus
from reformer_dist.load import LoadedModel, load_model
from reformer_dist.models.sequence import WholeSequence
from reformer_dist.ops.lsh import AttentionOptions
from reformer_dist.ops.lsh.coverage import Coverage, measure_coverage
from reformer_dist.ops.lsh.shared_keys import shared_keys


class MeasuredSequence(WholeSequence):
    """Attends as ever, and measures on the way what each LSH layer finds of exact attention."""

    def __init__(self) -> None:
        self.layers: list[Coverage] = []
        """Of the last model call, in order."""

    def bucket_attention(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
        bucket_ids: Tensor,
        options: AttentionOptions,
        key_padding_mask: Tensor | None,
        kept: dict[str, Any],
    ) -> Tensor:
        if k is None:  # keys of their own are those of local attention, which does not hash
            self.layers.append(measure_coverage(q, shared_keys(q), bucket_ids, options, key_padding_mask))
        return super().bucket_attention(q, k, v, bucket_ids, options, key_padding_mask, kept)


@torch.no_grad()
def coverage_of(loaded: LoadedModel, n_rows: int) -> list[dict[str, float]]:
    """Shares of each LSH layer over some held-out rows; every head counts alike. Raises UserError."""
    corpus = open_corpus(loaded.config.data, ["heldout"])
    device = next(loaded.model.parameters()).device
    totals: list[Coverage] = []
    batches = heldout_batches(
        corpus,
        seq_len=loaded.config.data.seq_len,
        rows=n_rows,
        micro_batch_size=1,
        max_damaged_share=loaded.config.data.max_damaged_share,
    )
    for batch in batches:
        sequence = MeasuredSequence()
        inputs, labels = batch.inputs.to(device), batch.labels.to(device)
        loaded.language_model(inputs, labels, key_padding_mask=labels != IGNORED_LABEL, sequence=sequence)
        totals = totals or [Coverage() for _ in sequence.layers]
        for total, layer in zip(totals, sequence.layers, strict=True):
            total.add(layer)
    return [total.shares() for total in totals]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m reformer_dist.coverage", description=measure_coverage.__doc__)
    parser.add_argument("run", type=Path, help="a run directory (its newest checkpoint) or a checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.n_hashes=8")
    parser.add_argument("--rows", type=int, default=4, help="held-out rows; 0 means all")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    return parser


def measure(arguments: argparse.Namespace) -> None:
    """Prints the coverage of a trained model, layer by layer. Raises UserError."""
    job = runtime.start()
    loaded = load_model(arguments.run, arguments.overrides, job.device)
    model = loaded.config.model
    if model.chunk_wrap:
        raise ConfigError("model.chunk_wrap=true: coverage is not defined for chunks that wrap into other rounds")
    layers = coverage_of(loaded, arguments.rows)
    if not layers:
        raise ConfigError(f"model.layers={[kind.name for kind in model.layers]}: none of them is lsh")
    mean = {name: sum(layer[name] for layer in layers) / len(layers) for name in layers[0]}
    for number, layer in enumerate(layers):
        print(f"LSH layer {number}: {_words(layer)}")
    print(f"mean: {_words(mean)}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({**mean, "layers": layers}, indent=1) + "\n")


def _words(shares: dict[str, float]) -> str:
    return f"{shares['mass']:.4f} of the softmax mass on {shares['pairs']:.4f} of the pairs"


def main() -> None:
    run_command(lambda: measure(build_parser().parse_intermixed_args()))


if __name__ == "__main__":
    main()
