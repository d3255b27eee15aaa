#!/usr/bin/env python3
"""Time that an asynchronous save blocks training, relative to a synchronous save of the same state.

First compares both checkpoints tensor by tensor. Exits 1 if they differ, or if the asynchronous save blocks
training for 10 % or more of the time of the synchronous one. The blocked time is all work of the main thread: the
check of disk space, the copy, and, after the writer thread has finished, the manifest and the rename. Medians over
--repeats.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from reformer_dist.checkpoint import AsyncSave, CheckpointReader, Fragment, RunRecord
from reformer_dist.checkpoint.fragment import KINDS, MOMENTS
from reformer_dist.distributed import runtime
from reformer_dist.distributed.runtime import Runtime

MAX_FRACTION = 0.10
N_FRAGMENTS = 24


def main() -> int:
    arguments = parse_arguments()
    torch.manual_seed(0)
    size = arguments.megabytes * 10**6 // (N_FRAGMENTS * len(KINDS) * 4)
    fragments = [make_fragment(f"layer{number}.weight", size) for number in range(N_FRAGMENTS)]
    job = runtime.start()
    buffers: dict[str, Tensor] = {}  # allocated by the first save, as in a run
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        root = Path(scratch)
        if not are_equal(job, root, fragments, buffers):
            print("the two checkpoints differ")
            return 1
        blocked, synchronous_times = [], []
        for step in range(3, 3 + arguments.repeats):
            synchronous_times.append(synchronous(job, root / "whole", step, fragments)[1])
            blocked.append(asynchronous(job, root / "copied", step, fragments, buffers)[1])
    runtime.stop()
    wait, total = statistics.median(blocked), statistics.median(synchronous_times)
    print(f"state of {arguments.megabytes} MB | synchronous save {total:.3f} s | training blocked {wait:.3f} s")
    print(f"fraction {wait / total:.3f} (limit {MAX_FRACTION})")
    return int(wait >= MAX_FRACTION * total)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--megabytes", type=int, default=300, help="size of weights and both moments (default: 300)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind (default: 5)")
    parser.add_argument(
        "--folder", type=Path, default=Path.cwd(), help="folder on the disk to measure (default: the current one)"
    )
    return parser.parse_args()


def make_fragment(name: str, size: int) -> Fragment:
    """A whole parameter with its moments."""
    state = {"step": torch.tensor(1.0), **{moment: torch.randn(size) for moment in MOMENTS}}
    return Fragment(name, 0, size, torch.randn(size), 0, state)


def begin(job: Runtime, root: Path, step: int, fragments: list[Fragment], buffers: dict[str, Tensor]) -> AsyncSave:
    shapes = {fragment.name: [fragment.length] for fragment in fragments}
    record = RunRecord(config={}, tokenizer={}, vocab_size=0, shapes=shapes)
    return AsyncSave(job, root, step, fragments, rank_state={}, record=record, extra_files={}, buffers=buffers)


def synchronous(job: Runtime, root: Path, step: int, fragments: list[Fragment]) -> tuple[Path, float]:
    start = time.perf_counter()
    folder = begin(job, root, step, fragments, {}).finish()
    return folder, time.perf_counter() - start


def asynchronous(
    job: Runtime, root: Path, step: int, fragments: list[Fragment], buffers: dict[str, Tensor]
) -> tuple[Path, float]:
    start = time.perf_counter()
    saving = begin(job, root, step, fragments, buffers)
    blocked = time.perf_counter() - start
    while not saving.is_done:
        time.sleep(0.01)  # a training step
    start = time.perf_counter()
    folder = saving.finish()
    return folder, blocked + time.perf_counter() - start


def are_equal(job: Runtime, root: Path, fragments: list[Fragment], buffers: dict[str, Tensor]) -> bool:
    """Whether both hold the state at the start of the save, although training modifies it during the save."""
    whole = CheckpointReader(synchronous(job, root / "whole", 1, fragments)[0])
    saving = begin(job, root / "copied", 1, fragments, buffers)
    for fragment in fragments:
        fragment.master.add_(1.0)
    copied = CheckpointReader(saving.finish())
    pairs = ((fragment, kind) for fragment in fragments for kind in KINDS)
    reads = ((each.name, kind, 0, each.length) for each, kind in pairs)
    return all(torch.equal(whole.read(*request), copied.read(*request)) for request in reads)


if __name__ == "__main__":
    sys.exit(main())
