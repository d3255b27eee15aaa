#!/usr/bin/env python3
"""Time to the first batch after resuming at several positions in the data.

Prints the seconds from opening the dataset to the first batch and their ratio to the first position. Times are
medians over --rounds, with positions interleaved. Exits 1 if a ratio exceeds --limit.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reformer_dist.data import (
    ByteTokenizer,
    Corpus,
    Quarantine,
    Sampler,
    TrainLoader,
    read_state,
    write_dataset,
)

SEQ_LEN, BATCH_SIZE = 1024, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="dataset (default: 20000 generated documents)")
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000, 100_000, 1_000_000], help="positions")
    parser.add_argument("--rounds", type=int, default=15, help="repetitions (default: 15)")
    parser.add_argument("--limit", type=float, default=1.5, help="largest accepted ratio (default: 1.5)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.data or make_data(Path(scratch))
        starts = {count: state_after(folder, count) for count in arguments.samples}
        seconds: dict[int, list[float]] = {count: [] for count in arguments.samples}
        for _ in range(arguments.rounds):
            for count, state in starts.items():
                seconds[count].append(time_of_first_batch(folder, state))
    first = statistics.median(seconds[arguments.samples[0]])
    ratios = {count: statistics.median(times) / first for count, times in seconds.items()}
    print(f"{'samples':>14}  {'steps':>12}  {'seconds':>8}  {'ratio':>6}")
    for count, ratio in ratios.items():
        print(f"{count:>14,}  {starts[count]['step']:>12,}  {ratio * first:>8.4f}  {ratio:>6.2f}")
    return int(max(ratios.values()) > arguments.limit)


def make_data(scratch: Path) -> Path:
    draw = random.Random(0)
    documents = ((str(number), draw.randbytes(draw.randint(100, 3000)).hex().encode()) for number in range(20_000))
    write_dataset(documents, scratch / "data", ByteTokenizer(), shard_bytes=4 << 20)
    return scratch / "data"


def open_sampler(folder: Path) -> Sampler:
    return Sampler(Corpus.open([folder]), seed=0, batch_size=BATCH_SIZE, seq_len=SEQ_LEN)


def open_loader(sampler: Sampler, state: dict[str, Any] | None) -> TrainLoader:
    resumed = None if state is None else read_state(state, sampler)
    quarantine = Quarantine(sampler.corpus.total("samples", "train"), 0.0)
    return TrainLoader(sampler, quarantine, micro_batch_size=BATCH_SIZE, state=resumed, workers=1)


def state_after(folder: Path, n_samples: int) -> dict[str, Any]:
    """Loader state of a run after `n_samples` samples, computed from the number of steps."""
    sampler = open_sampler(folder)
    with open_loader(sampler, None) as loader:
        state = next(loader).state
    tokens_per_sample = sampler.pools[0].n_units / sampler.corpus.total("samples", "train")
    steps = max(1, round(n_samples * tokens_per_sample / (BATCH_SIZE * SEQ_LEN)))
    streams = {key: [steps * SEQ_LEN, digest] for key, (_, digest) in state["streams"].items()}
    return {**state, "step": steps, "streams": streams}


def time_of_first_batch(folder: Path, state: dict[str, Any]) -> float:
    start = time.perf_counter()
    with open_loader(open_sampler(folder), state) as loader:
        next(loader)
        return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
