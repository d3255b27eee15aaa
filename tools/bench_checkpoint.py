#!/usr/bin/env python3
"""How long a save keeps training waiting: written in the background, against a synchronous save of the same state.

Both checkpoints are first compared, tensor by tensor. Exits 1 if they differ, or if the background save makes
training wait for 10 % or more of the time of the synchronous one. The wait is all that the main thread does: the
look at the disk, the copy, and, when the thread is done, the manifest and the rename. Medians over --repeats.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reformer_dist.checkpoint import CheckpointReader, AsyncSave
from reformer_dist.distributed import runtime
from reformer_dist.distributed.runtime import Runtime

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
LARGEST_SHARE = 0.10
N_FRAGMENTS = 24


@dataclass(frozen=True)
class Fragment:
    """A whole parameter and its moments."""

    name: str
    tensors: dict[str, Tensor]
    offset: int = 0
    adam_step: int = 1

    @property
    def length(self) -> int:
        return self.tensors["fp32"].numel()

    def values(self, kind: str) -> Tensor:
        return self.tensors[kind]


def main() -> int:
    arguments = parse_arguments()
    torch.manual_seed(0)
    size = arguments.megabytes * 10**6 // (N_FRAGMENTS * len(KINDS) * 4)
    fragments = [
        Fragment(f"layer{number}.weight", {kind: torch.randn(size) for kind in KINDS})
        for number in range(N_FRAGMENTS)
    ]
    job = runtime.start()
    copies: dict[str, Tensor] = {}  # as in a run, memory for them is taken by the first save
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        root = Path(scratch)
        if not are_equal(job, root, fragments, copies):
            print("the two checkpoints differ")
            return 1
        waits, whole = [], []
        for step in range(3, 3 + arguments.repeats):
            whole.append(synchronous(job, root / "whole", step, fragments)[1])
            waits.append(background(job, root / "copied", step, fragments, copies)[1])
    runtime.stop()
    wait, all_of_it = statistics.median(waits), statistics.median(whole)
    print(f"state of {arguments.megabytes} MB | synchronous save {all_of_it:.3f} s | training waits {wait:.3f} s")
    print(f"share {wait / all_of_it:.3f} (bound {LARGEST_SHARE})")
    return int(wait >= LARGEST_SHARE * all_of_it)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=300, help="weights and both moments")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk that is to be measured")
    return parser.parse_args()


def begin(job: Runtime, root: Path, step: int, fragments: list[Fragment], copies: dict[str, Tensor]) -> AsyncSave:
    shapes = {fragment.name: [fragment.length] for fragment in fragments}
    run = {"shapes": shapes}
    return AsyncSave(job, root, step, fragments, rank_state={}, run=run, extra_files={}, copies=copies)


def synchronous(job: Runtime, root: Path, step: int, fragments: list[Fragment]) -> tuple[Path, float]:
    start = time.perf_counter()
    folder = begin(job, root, step, fragments, {}).finish()
    return folder, time.perf_counter() - start


def background(
    job: Runtime, root: Path, step: int, fragments: list[Fragment], copies: dict[str, Tensor]
) -> tuple[Path, float]:
    start = time.perf_counter()
    saving = begin(job, root, step, fragments, copies)
    waited = time.perf_counter() - start
    while not saving.is_done:
        time.sleep(0.01)  # a step
    start = time.perf_counter()
    folder = saving.finish()
    return folder, waited + time.perf_counter() - start


def are_equal(job: Runtime, root: Path, fragments: list[Fragment], copies: dict[str, Tensor]) -> bool:
    """Both hold what was there when the save began, though training changes it meanwhile."""
    whole = CheckpointReader(synchronous(job, root / "whole", 1, fragments)[0])
    saving = begin(job, root / "copied", 1, fragments, copies)
    for fragment in fragments:
        fragment.tensors["fp32"].add_(1.0)
    copied = CheckpointReader(saving.finish())
    pairs = ((fragment, kind) for fragment in fragments for kind in KINDS)
    reads = ((each.name, kind, 0, each.length) for each, kind in pairs)
    return all(torch.equal(whole.read(*place), copied.read(*place)) for place in reads)


if __name__ == "__main__":
    sys.exit(main())
