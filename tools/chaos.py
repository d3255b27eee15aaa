#!/usr/bin/env python3
"""Kills a small run again and again with SIGKILL, starts it anew each time, and compares it with an uncut one.

Exits 1 unless the losses, gradient norms and evaluations of every step are equal to the last bit, the last
checkpoints hold the same tensors, every checkpoint on disk is whole or refused, and no kill cost more steps than
lie between two checkpoints. The moments are drawn from --seed: after a time, or as soon as a save is under way.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reformer_dist.checkpoint import CheckpointReader, find_checkpoint, is_good
from reformer_dist.data import ByteTokenizer, write_dataset

SAVE_EVERY = 5
WORDS = [
    "time",
    "water",
    "light",
    "house",
    "little",
    "great",
    "under",
    "never",
    "river",
    "people",
    "stone",
    "word",
]
TINY = [
    *("model.dim=32", "model.n_layers=2", "model.n_heads=2", "model.n_buckets=4", "model.window=16"),
    *("model.local_window=16", "model.axial_shape=[8,16]", "model.dropout=0.1", "data.seq_len=64"),
    *("data.batch_size=4", "data.eval_rows=4", "trainer.log_every=1", "trainer.eval_every=20"),
    *(f"trainer.save_every={SAVE_EVERY}", "trainer.keep_checkpoints=3", "deepspeed=zero2"),
]
UNLIKE = ("time_s", "perf/", "checkpoint/")  # what depends on the clock


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        data = write_data(Path(scratch) / "data")
        whole, cut = Path(scratch) / "whole", Path(scratch) / "cut"
        print("uninterrupted run", flush=True)
        with start(data, whole, arguments) as process:
            output, _ = process.communicate(timeout=1200)
        if process.returncode:
            print(output)
            return 1
        problems = torment(data, cut, arguments)
        problems += compare(whole, cut)
    for problem in problems:
        print(f"WRONG: {problem}")
    print("all equal, bit for bit" if not problems else f"{len(problems)} problems")
    return int(bool(problems))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def write_data(folder: Path) -> Path:
    draw = random.Random(0)
    texts = (" ".join(draw.choices(WORDS, k=draw.randint(40, 160))) for _ in range(40))
    documents = [(f"doc{number}", text.encode()) for number, text in enumerate(texts)]
    write_dataset(documents, folder, ByteTokenizer(), shard_bytes=10_000, heldout_fraction=0.15)
    return folder


def start(data: Path, run: Path, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    ranks = ["launcher=local", f"launcher.nproc_per_node={arguments.ranks}"]
    overrides = [*TINY, *ranks, f"trainer.max_steps={arguments.steps}", f"data.path={data}", f"output_dir={run}"]
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "reformer_dist.train", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def torment(data: Path, run: Path, arguments: argparse.Namespace) -> list[str]:
    """Kills the run so many times, then lets it end; what went wrong."""
    draw = random.Random(arguments.seed)
    problems: list[str] = []
    done_again = kills = 0
    while True:
        before = last_step(run)
        with start(data, run, arguments) as process:
            if kills < arguments.kills:
                goal = arguments.steps * (kills + 1) // (arguments.kills + 2)
                how = wait_for_moment(process, run, draw, goal)
                victims = ranks_of(process.pid)
                if draw.random() < 0.5:
                    how, victims = how + ", one rank", draw.sample(victims, min(1, len(victims)))
                else:
                    how += ", all ranks"
                for victim in victims:
                    os.kill(victim, signal.SIGKILL)
            output, _ = process.communicate(timeout=600)
        found = re.search(r"resuming from .* at step (\d+)", output)
        if found is not None:  # else it was killed before it had said where it resumes
            begun = int(found[1])
            if before - begun > SAVE_EVERY + 1:
                problems.append(f"went back from step {before} to {begun}:\n{output}")
            done_again += max(0, before - begun)
        problems += wrong_checkpoints(run)
        if process.returncode == 0:
            break
        if kills == arguments.kills:
            return [*problems, f"ended with status {process.returncode}:\n{output}"]
        kills += 1
        print(f"kill {kills}: {how}, after step {last_step(run)}", flush=True)
    if kills < arguments.kills:
        problems.append(f"only {kills} of {arguments.kills} kills came before the end")
    print(f"{kills} kills, {done_again} steps done again, of {arguments.steps}")
    return problems


def wait_for_moment(process: subprocess.Popen[str], run: Path, draw: random.Random, goal: int) -> str:
    """Returns in the midst of a save, or some time after a step."""
    in_a_save = draw.random() < 0.4
    pause = draw.uniform(0, 0.5)
    while process.poll() is None and (last_step(run) < goal or not ranks_of(process.pid)):
        time.sleep(0.01)
    while process.poll() is None and in_a_save:
        if list((run / "checkpoints").glob(".step-*.partial")):
            time.sleep(draw.uniform(0, 0.01))
            return "in a save"
    time.sleep(0 if in_a_save else pause)
    return "between saves"


def ranks_of(launcher: int) -> list[int]:
    """Processes that the launcher has started."""
    children = Path(f"/proc/{launcher}/task").glob("*/children")
    found = [int(word) for path in children for word in path.read_text().split()]
    return [pid for pid in found if "reformer_dist.train" in Path(f"/proc/{pid}/cmdline").read_text()]


def rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]  # what follows the last newline is not whole
    return [json.loads(line) for line in lines]


def last_step(run: Path) -> int:
    return max((row["step"] for row in rows(run)), default=0)


def wrong_checkpoints(run: Path) -> list[str]:
    """Of the checkpoints that verify: those that can't be read. The newest of all must verify."""
    found, complaints = find_checkpoint(run / "checkpoints")
    wrong = [f"a kill left a damaged checkpoint: {words}" for words in complaints]
    if found is not None:
        read_all(found)
    return wrong


def read_all(folder: Path) -> dict[str, bytes]:
    reader = CheckpointReader(folder)
    sizes = {name: math.prod(shape) for name, shape in reader.run["shapes"].items()}
    kinds = ("fp32", "exp_avg", "exp_avg_sq")
    return {
        f"{name}|{kind}": reader.read(name, kind, 0, size).numpy().tobytes()
        for name, size in sizes.items()
        for kind in kinds
    }


def compare(whole: Path, cut: Path) -> list[str]:
    def curve(run: Path) -> list[dict[str, Any]]:
        return [{tag: row[tag] for tag in row if not tag.startswith(UNLIKE)} for row in rows(run)]

    expected, found = curve(whole), curve(cut)
    problems = [f"step {a['step']}: {b} instead of {a}" for a, b in zip(expected, found, strict=False) if a != b]
    if len(expected) != len(found):
        problems.append(f"{len(found)} lines of metrics instead of {len(expected)}")
    for path in sorted((cut / "checkpoints").iterdir()):
        other = whole / "checkpoints" / path.name
        if is_good(path) is None and other.is_dir() and read_all(path) != read_all(other):
            problems.append(f"{path.name} verifies and is wrong")
    return problems


if __name__ == "__main__":
    sys.exit(main())
