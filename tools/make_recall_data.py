#!/usr/bin/env python3
"""Writes datasets of tasks that measure recall. Only their answers are labels (task.kind=completion).

mqar          multi-query associative recall in the sizes of zoology: 64 to 256 tokens, 4 to 64 pairs, 8,192 ids;
              with --tokens, --pairs and --vocab-size one size, whose accuracy is reported by distance
joint_recall  keys whose values depend on their context, in the format of HAX: --contexts 8 --keys 8
induction     the token that followed a special one before: --tokens 256
needle        sentences hidden in text, and questions at its end, in bytes: --tokens 2048
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from reformer_dist.data import (
    ByteTokenizer,
    IdTokenizer,
    RawSample,
    TextOptions,
    Tokenizer,
    read_text,
    write_samples,
)
from reformer_dist.data.prepare import needles, recall
from reformer_dist.errors import ConfigError, UserError
from reformer_dist.process.stdio import exit_quietly

MQAR_VOCAB = 8192
MQAR_TRAIN = {(64, 4): 100_000, (128, 8): 20_000, (256, 16): 20_000, (256, 32): 20_000, (256, 64): 20_000}
MQAR_HELDOUT = {(64, 4): 1000, (64, 8): 1000, (64, 16): 1000, (128, 32): 1000, (256, 64): 1000}
HAYSTACK = Path(sysconfig.get_paths()["stdlib"])

Splits = tuple[Iterator[RawSample], Iterator[RawSample], Tokenizer]
"""Training samples, held-out samples, and the tokenizer of both."""


def main() -> int:
    arguments = _parse()
    draw = np.random.default_rng(arguments.seed)
    make = {"mqar": _mqar, "joint_recall": _joint_recall, "induction": _induction, "needle": _needle}
    try:
        train, heldout, tokenizer = make[arguments.kind](arguments, draw)
        summary = write_samples(
            train, arguments.output, tokenizer, overwrite=arguments.overwrite, heldout=heldout, label_spans=True
        )
    except UserError as error:
        print(f"make_recall_data.py: error: {error}", file=sys.stderr)
        return 1
    counts = ", ".join(f"{summary.total('samples', split):,} {split}" for split in summary.splits)
    print(f"{arguments.output}: {counts} samples, vocabulary of {tokenizer.vocab_size} tokens")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("kind", choices=("mqar", "joint_recall", "induction", "needle"))
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the dataset")
    add("--samples", type=int, help="training samples (default: mqar 180000, needle 4000, others 40000)")
    add("--heldout", type=int, help="held-out samples (default: mqar 5000, needle 200, others 1000)")
    add("--tokens", type=int, help="tokens per sample, for mqar, induction (default: 256) and needle (2048)")
    add("--pairs", type=int, help="mqar with --tokens: pairs of key and value (default: a quarter of what fits)")
    add("--vocab-size", type=int, help="mqar with --tokens: number of ids (default: 8192)")
    add("--contexts", type=int, default=8, help="joint_recall: maximum number of contexts (default: 8)")
    add("--keys", type=int, default=8, help="joint_recall: maximum number of keys per context (default: 8)")
    add("--text", type=Path, default=HAYSTACK, help="needle: a file or folder (default: standard library)")
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    add("--overwrite", action="store_true", help="replace an existing dataset in DIR")
    return parser.parse_args()


def _sizes(arguments: argparse.Namespace, train: int, heldout: int) -> tuple[int, int]:
    given = arguments.samples, arguments.heldout
    return (train if given[0] is None else given[0]), (heldout if given[1] is None else given[1])


def _mqar(arguments: argparse.Namespace, draw: np.random.Generator) -> Splits:
    vocab_size = MQAR_VOCAB if arguments.vocab_size is None else arguments.vocab_size
    if arguments.tokens is not None:
        size = {"n_tokens": arguments.tokens, "n_pairs": arguments.pairs or max(1, arguments.tokens // 16)}
        train, heldout = (
            recall.mqar(draw, n, **size, vocab_size=vocab_size, power=1.0, by_distance=True)
            for n in _sizes(arguments, 40_000, 200)
        )
        return train, heldout, IdTokenizer(vocab_size)
    for name, value in (("--pairs", arguments.pairs), ("--vocab-size", arguments.vocab_size)):
        if value is not None:
            raise ConfigError(f"{name} {value}: needs --tokens; without it, mqar has the sizes of zoology")
    train, heldout = (
        _mqar_mixture(draw, shapes, n)
        for shapes, n in zip((MQAR_TRAIN, MQAR_HELDOUT), _sizes(arguments, 180_000, 5000), strict=True)
    )
    return train, heldout, IdTokenizer(vocab_size)


def _mqar_mixture(
    draw: np.random.Generator, shapes: Mapping[tuple[int, int], int], n_samples: int
) -> Iterator[RawSample]:
    """About n_samples of all shapes (tokens, pairs), in proportion to their numbers."""
    for (n_tokens, n_pairs), weight in shapes.items():
        n = -(-weight * n_samples // sum(shapes.values()))
        yield from recall.mqar(draw, n, n_tokens=n_tokens, n_pairs=n_pairs)


def _joint_recall(arguments: argparse.Namespace, draw: np.random.Generator) -> Splits:
    train, heldout = (
        recall.joint_recall(draw, n, n_contexts=arguments.contexts, n_keys=arguments.keys)
        for n in _sizes(arguments, 40_000, 1000)
    )
    return train, heldout, IdTokenizer(recall.joint_recall_vocab_size(arguments.contexts, arguments.keys))


def _induction(arguments: argparse.Namespace, draw: np.random.Generator) -> Splits:
    n_tokens = 256 if arguments.tokens is None else arguments.tokens
    train, heldout = (recall.induction(draw, n, n_tokens=n_tokens) for n in _sizes(arguments, 40_000, 1000))
    return train, heldout, IdTokenizer(16)


def _needle(arguments: argparse.Namespace, draw: np.random.Generator) -> Splits:
    """The last tenth of the text is the haystack of the held-out samples."""
    suffixes = (".py",) if arguments.text == HAYSTACK else ()
    text = b"\n".join(sample.fields[0] for sample in read_text([arguments.text], TextOptions(suffixes)))
    cut = len(text) * 9 // 10
    n_bytes = 2048 if arguments.tokens is None else arguments.tokens
    train, heldout = (
        needles.needle_samples(draw, part, n, n_bytes=n_bytes)
        for part, n in zip((text[:cut], text[cut:]), _sizes(arguments, 4000, 200), strict=True)
    )
    return train, heldout, ByteTokenizer()


if __name__ == "__main__":
    with exit_quietly():
        sys.exit(main())
