"""Entry: held-out loss and bits per byte of a trained model. `reformer-evaluate RUN [key=value ...]`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from reformer_dist.baselines import gzip_bits_per_byte, order0_bits_per_byte
from reformer_dist.cli import run_command
from reformer_dist.data import IGNORED_LABEL, Corpus, EvalBatch, heldout_batches
from reformer_dist.distributed import failures, runtime
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import CheckpointError
from reformer_dist.feed import open_corpus
from reformer_dist.load import LoadedModel, load_model
from reformer_dist.log import logger
from reformer_dist.share import share_sequences
from reformer_dist.training.evaluator import EvalResult, evaluate

MICRO_BATCH = 8


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reformer-evaluate",
        description="Held-out loss of a trained model, beside what simple compressors make of the same text.",
        epilog="example: reformer-evaluate outputs/quickstart --rows 200 model.n_hashes=8",
    )
    parser.add_argument("run", type=Path, help="a run directory (its newest checkpoint) or a checkpoint")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as model.n_hashes=8 or data.path=..."
    )
    parser.add_argument("--rows", type=int, default=0, help="held-out rows to use; 0, the default, means all")
    return parser


def run_evaluation(arguments: argparse.Namespace) -> None:
    """Evaluates as one rank of the job; rank 0 prints."""
    job = runtime.start()
    with failures.named(job):
        _evaluate(arguments, job)


def _evaluate(arguments: argparse.Namespace, job: Runtime) -> None:
    loaded = job.together(lambda: load_model(arguments.run, arguments.overrides, job.device))
    corpus = job.together(lambda: _open_corpus(loaded))

    def batches(rank: int, size: int) -> Iterator[EvalBatch]:
        data = loaded.config.data
        return heldout_batches(
            corpus,
            seq_len=data.seq_len,
            rows=arguments.rows,
            micro_batch_size=MICRO_BATCH,
            dp_rank=rank,
            dp_size=size,
            max_damaged_share=data.max_damaged_share,
            report=lambda damage: logger.warning(f"not evaluated: {damage}"),
        )

    sequence = share_sequences(loaded.config, job, MICRO_BATCH)
    grid = sequence.grid
    token_bytes = torch.from_numpy(loaded.tokenizer.token_bytes)
    result = evaluate(loaded.model, batches(grid.dp_rank, grid.dp_size), token_bytes, job, sequence)
    if job.is_main:
        print(_report(loaded, result, _text_of(batches(0, 1), loaded)))


def _open_corpus(loaded: LoadedModel) -> Corpus:
    corpus = open_corpus(loaded.config.data, ["heldout"])
    if corpus.tokenizer.vocab_size != loaded.tokenizer.vocab_size:
        raise CheckpointError(
            f"data.path={corpus.where}: has a vocabulary of {corpus.tokenizer.vocab_size}, "
            f"the model was trained with one of {loaded.tokenizer.vocab_size}"
        )
    return corpus


def _text_of(batches: Iterator[EvalBatch], loaded: LoadedModel) -> bytes:
    """The text that was predicted."""
    ids = torch.cat([batch.labels[batch.labels != IGNORED_LABEL] for batch in batches])
    return loaded.tokenizer.decode(ids.tolist()).encode()


def _report(loaded: LoadedModel, result: EvalResult, text: bytes) -> str:
    return "\n".join(
        [
            f"checkpoint: {loaded.checkpoint}",
            f"held-out text: {result.text_bytes:,} bytes, {result.tokens:,} tokens",
            f"held-out loss: {result.loss:.4f} nats per token",
            f"held-out bits per byte: {result.bits_per_byte:.4f}",
            f"  order-0 entropy of the same text: {order0_bits_per_byte(text):.4f}",
            f"  gzip -9 of the same text: {gzip_bits_per_byte(text):.4f}",
        ]
    )


def main() -> None:
    run_command(lambda: run_evaluation(build_parser().parse_intermixed_args()))


if __name__ == "__main__":
    main()
