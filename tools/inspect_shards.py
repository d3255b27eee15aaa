#!/usr/bin/env python3
"""Shows what a data set holds, and checks that it is still what was written."""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

from reformer_dist.data import SPLITS, Dataset, SampleReader, Source, find_damage
from reformer_dist.errors import DataError

SHOWN_CHARACTERS = 300


def main() -> int:
    arguments = parse_arguments()
    try:
        dataset = Dataset.open(arguments.folder)
        show_counts(dataset)
        for split in SPLITS:
            show_samples(dataset, split, arguments.samples)
        return verify(dataset) if arguments.verify else 0
    except DataError as error:
        print(f"inspect_shards.py: error: {error}", file=sys.stderr)
        return 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder that holds dataset.json")
    add(
        "--samples",
        type=int,
        default=0,
        metavar="N",
        help="show the first N documents of each split (default: 0)",
    )
    add(
        "--verify",
        action="store_true",
        help="check the sha256 of every shard and sample; exit 1 if any is bad",
    )
    return parser.parse_args()


def show_counts(dataset: Dataset) -> None:
    tokenizer = dataset.tokenizer
    kind = type(tokenizer).__name__
    print(f"{dataset.folder.address}: {kind} of {tokenizer.vocab_size} tokens, stored as {tokenizer.dtype}")
    print(f"  fingerprint {dataset.fingerprint}")
    for split in SPLITS:
        samples, n_bytes, tokens = (dataset.total(count, split) for count in ("samples", "text_bytes", "tokens"))
        print(
            f"  {split:8} {samples:>10,} documents  {n_bytes:>14,} bytes  "
            f"{tokens:>14,} tokens  {len(dataset.shards(split)):>6,} shards"
        )


def show_samples(dataset: Dataset, split: str, n_samples: int) -> None:
    located = ((shard, entry) for shard in dataset.shards(split) for entry in dataset.index(shard).entries)
    reader = SampleReader()
    for shard, entry in islice(located, n_samples):
        text = dataset.tokenizer.decode(reader.read(Source(dataset, shard, entry)))
        size = f"{entry.n_bytes:,} bytes, {entry.n_tokens:,} tokens"
        print(f"\n--- {shard.name} {entry.key}: {entry.document}, {size}")
        print(text[:SHOWN_CHARACTERS] + ("..." if len(text) > SHOWN_CHARACTERS else ""))


def verify(dataset: Dataset) -> int:
    damaged = list(find_damage(dataset))
    for line in damaged:
        print(f"inspect_shards.py: error: {line}", file=sys.stderr)
    if not damaged:
        print("all shards and samples are as they were written")
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
