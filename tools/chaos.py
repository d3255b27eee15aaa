#!/usr/bin/env python3
"""Kills a small run again and again with SIGKILL, starts it anew each time, and compares it with an uncut one.

Exits 1 unless the losses, gradient norms and evaluations of every step are equal to the last bit, in metrics.jsonl
and for TensorBoard, each step once; every checkpoint that verifies after a kill holds the tensors and the data
position of the uncut run; and each attempt goes on from the newest of them. The moments are drawn from --seed:
some time after a step, or as soon as a save is under way.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from reformer_dist.checkpoint import CheckpointReader, find_checkpoint, verify_checkpoint
from reformer_dist.checkpoint.files import step_of
from reformer_dist.data import merge_states

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.events import read_events, scalars
from support.tiny import tiny_overrides, write_tiny_dataset
from support.weights import differing

SAVE_EVERY = 5
CHANGED = (f"trainer.save_every={SAVE_EVERY}", "trainer.eval_every=20", "trainer.micro_batch_size=null")
CHANGED += ("deepspeed=zero2", "launcher=local")
UNLIKE = ("time_s", "perf/", "checkpoint/")  # what depends on the clock


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        data = write_tiny_dataset(Path(scratch) / "data")
        whole, cut = Path(scratch) / "whole", Path(scratch) / "cut"
        print("uninterrupted run", flush=True)
        with start(data, whole, arguments, "trainer.keep_checkpoints=0") as process:
            output, _ = process.communicate(timeout=1200)
        if process.returncode:
            print(output)
            return 1
        problems = run_with_kills(data, cut, whole, arguments)
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


def start(data: Path, run: Path, arguments: argparse.Namespace, *changed: str) -> subprocess.Popen[str]:
    more = (f"launcher.nproc_per_node={arguments.ranks}", f"trainer.max_steps={arguments.steps}")
    overrides = tiny_overrides(data, run, *CHANGED, *more, "trainer.keep_checkpoints=3", *changed)
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "reformer_dist.train", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def run_with_kills(data: Path, run: Path, whole: Path, arguments: argparse.Namespace) -> list[str]:
    """Kills the run so many times, then lets it end; what went wrong."""
    draw = random.Random(arguments.seed)
    problems: list[str] = []
    done_again = kills = 0
    while True:
        before, saved = last_step(run), newest(run)
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
            if begun != saved:
                problems.append(f"went back to step {begun} instead of {saved}:\n{output}")
            done_again += max(0, before - begun)
        problems += wrong_checkpoints(run, whole)
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
    with suppress(psutil.Error):
        children = psutil.Process(launcher).children(recursive=True)
        return [child.pid for child in children if "RANK" in child.environ()]
    return []


def rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]  # what follows the last newline is not whole
    return [json.loads(line) for line in lines]


def last_step(run: Path) -> int:
    return max((row["step"] for row in rows(run)), default=0)


def newest(run: Path) -> int:
    """The step of the newest checkpoint that verifies."""
    found, _ = find_checkpoint(run / "checkpoints")
    return 0 if found is None else step_of(found)


def wrong_checkpoints(run: Path, whole: Path) -> list[str]:
    """Those that do not verify though they have their name, or verify and are not what the uncut run saved."""
    wrong = [f"a kill left a damaged checkpoint: {words}" for words in find_checkpoint(run / "checkpoints")[1]]
    for folder in (run / "checkpoints").glob("step-*"):
        if verify_checkpoint(folder) is None:
            other = whole / "checkpoints" / folder.name
            odd = differing(folder, other) + ["data position"] * (data_state(folder) != data_state(other))
            wrong += [f"{folder.name} verifies and is wrong in {', '.join(odd)}"] * bool(odd)
    return wrong


def data_state(folder: Path) -> dict[str, Any]:
    return merge_states([rank["data"] for rank in CheckpointReader(folder).rank_states])


def compare(whole: Path, cut: Path) -> list[str]:
    def curve(run: Path) -> list[dict[str, Any]]:
        return [{tag: row[tag] for tag in row if not tag.startswith(UNLIKE)} for row in rows(run)]

    expected, found = curve(whole), curve(cut)
    problems = [f"step {a['step']}: {b} instead of {a}" for a, b in zip(expected, found, strict=False) if a != b]
    if len(expected) != len(found):
        problems.append(f"{len(found)} lines of metrics instead of {len(expected)}")
    tags = read_events(whole).Tags()["scalars"]
    if read_events(cut).Tags()["scalars"] != tags:
        problems.append("TensorBoard has other curves")
    odd = [tag for tag in tags if not tag.startswith(UNLIKE) and scalars(cut, tag) != scalars(whole, tag)]
    return problems + [f"TensorBoard shows another curve of {tag}" for tag in odd]


if __name__ == "__main__":
    sys.exit(main())
