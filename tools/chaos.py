#!/usr/bin/env python3
"""Repeatedly kills a small run with SIGKILL, restarts it, and compares it with an uninterrupted run.

Exits 1 unless all of this holds: losses, gradient norms and evaluations of every step are bitwise equal in
metrics.jsonl and TensorBoard, with each step logged once; every checkpoint that verifies after a kill has the
tensors and data position of the uninterrupted run; and each restart resumes from the newest of them. The moments
of the kills are drawn from --seed and counted in steps, so that no machine is too fast for them: after a step of
the first half of the run, or during the first save after it.

Then the run continues with a rate at which it diverges, and is killed once more. It must stop, keep its last
checkpoint, and name a command that continues from there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from reformer_dist.checkpoint import CheckpointReader, checkpoint_problem, find_checkpoint
from reformer_dist.checkpoint.files import step_folder, step_of
from reformer_dist.data import merge_states

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.events import read_events, scalars
from support.tiny import tiny_overrides, write_tiny_dataset
from support.weights import differing

SAVE_EVERY = 5
CHANGED = (f"trainer.save_every={SAVE_EVERY}", "trainer.eval_every=20", "trainer.micro_batch_size=null")
CHANGED += ("deepspeed=zero2", "launcher=local")
TIMING_TAGS = ("time_s", "perf/", "checkpoint/")


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        data = write_tiny_dataset(Path(scratch) / "data")
        reference, run = Path(scratch) / "reference", Path(scratch) / "killed"
        print("uninterrupted run", flush=True)
        with start(data, reference, arguments, "trainer.keep_checkpoints=0") as process:
            output, _ = process.communicate(timeout=1200)
        if process.returncode:
            print(output)
            return 1
        problems = run_with_kills(data, run, reference, arguments)
        problems += compare(reference, run)
        problems += diverge(data, run, arguments)
    for problem in problems:
        print(f"WRONG: {problem}")
    print("all bitwise equal" if not problems else f"{len(problems)} problems")
    return int(bool(problems))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="default: 20")
    parser.add_argument("--steps", type=int, default=400, help="default: 400")
    parser.add_argument("--ranks", type=int, default=2, help="default: 2")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills (default: 0)")
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


def run_with_kills(data: Path, run: Path, reference: Path, arguments: argparse.Namespace) -> list[str]:
    """Kills the run --kills times, then lets it finish; returns the problems found."""
    draw = random.Random(arguments.seed)
    problems: list[str] = []
    repeated_steps = kills = 0
    while True:
        before, saved = last_step(run), newest_checkpoint(run)
        with start(data, run, arguments) as process:
            if kills < arguments.kills:
                goal = arguments.steps // 2 * (kills + 1) // arguments.kills
                moment = wait_for_kill(process, run, draw, goal)
                victims = ranks_of(process.pid)
                if draw.random() < 0.5:
                    moment, victims = moment + ", one rank", draw.sample(victims, min(1, len(victims)))
                else:
                    moment += ", all ranks"
                for victim in victims:
                    os.kill(victim, signal.SIGKILL)
            output, _ = process.communicate(timeout=600)
        match = re.search(r"resuming from .* at step (\d+)", output)
        if match is not None:  # else it was killed before it logged the step
            resumed = int(match[1])
            if resumed != saved:
                problems.append(f"resumed at step {resumed} instead of {saved}:\n{output}")
            repeated_steps += max(0, before - resumed)
        problems += wrong_checkpoints(run, reference)
        if process.returncode == 0:
            break
        if kills == arguments.kills:
            return [*problems, f"exit status {process.returncode}:\n{output}"]
        kills += 1
        print(f"kill {kills}: {moment}, after step {last_step(run)}", flush=True)
    if kills < arguments.kills:
        problems.append(f"the run finished after {kills} of {arguments.kills} kills")
    print(f"{kills} kills, {repeated_steps} repeated steps, {arguments.steps} steps in total")
    return problems


def diverge(data: Path, run: Path, arguments: argparse.Namespace) -> list[str]:
    """Continues the finished run with too high a rate, kills it, and runs the command of its last message."""
    last, program = step_folder(run / "checkpoints", arguments.steps), "python -m reformer_dist.train"
    before = {path.name: path.read_bytes() for path in last.iterdir()}
    changed = (f"trainer.max_steps={arguments.steps + 200}", "optim.lr=1e20", "trainer.max_skipped_steps=100")
    changed += ("optim.accept_jump=true",)  # also at the old rate, with which it is continued: the run had ended
    with start(data, run, arguments, *changed, "trainer.save_every=1") as process:
        while process.poll() is None and last_step(run) < arguments.steps + 10:
            time.sleep(0.01)
        for rank in ranks_of(process.pid):
            os.kill(rank, signal.SIGKILL)
        process.communicate(timeout=600)
    print(f"killed while diverging, after step {last_step(run)}", flush=True)
    with start(data, run, arguments, *changed, "trainer.save_every=1") as process:
        output, _ = process.communicate(timeout=600)
    if process.returncode != 1 or program not in output:
        return [f"exit status {process.returncode} of a run that diverges:\n{output}"]
    if not last.is_dir() or {path.name: path.read_bytes() for path in last.iterdir()} != before:
        return [f"{last} has changed while the run diverged"]
    advice = output[output.index(program) :].splitlines()[0]
    print(f"continued by: {advice}", flush=True)
    command = [sys.executable, *shlex.split(advice)[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    if done.returncode or f"{last} at step {arguments.steps}" not in done.stdout or "| skipped" in done.stdout:
        return [f"exit status {done.returncode} of the command that was advised:\n{done.stdout}"]
    return []


def wait_for_kill(process: subprocess.Popen[str], run: Path, draw: random.Random, goal: int) -> str:
    """Waits for a step soon after `goal`, or then for a save, during two intervals of saves; returns which."""
    during_save = draw.random() < 0.5
    goal += draw.randrange(SAVE_EVERY)
    while process.poll() is None and (last_step(run) < goal or not ranks_of(process.pid)):
        time.sleep(0.01)
    while process.poll() is None and during_save and last_step(run) < goal + 2 * SAVE_EVERY:
        if list((run / "checkpoints").glob(".step-*.partial")):
            time.sleep(draw.uniform(0, 0.01))  # somewhere in the save
            return "during a save"
    return "between saves"


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the ranks of a launcher."""
    with suppress(psutil.Error):
        children = psutil.Process(launcher).children(recursive=True)
        return [child.pid for child in children if "RANK" in child.environ()]
    return []


def rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]  # a line without newline is incomplete
    return [json.loads(line) for line in lines]


def last_step(run: Path) -> int:
    return max((row["step"] for row in rows(run)), default=0)


def newest_checkpoint(run: Path) -> int:
    """The step of the newest checkpoint that verifies."""
    folder, _ = find_checkpoint(run / "checkpoints")
    return 0 if folder is None else step_of(folder)


def wrong_checkpoints(run: Path, reference: Path) -> list[str]:
    """Completed checkpoints that do not verify, or that differ from those of the uninterrupted run."""
    wrong = [f"a kill left a damaged checkpoint: {words}" for words in find_checkpoint(run / "checkpoints")[1]]
    for folder in (run / "checkpoints").glob("step-*"):
        if checkpoint_problem(folder) is None:
            other = reference / "checkpoints" / folder.name
            differences = differing(folder, other) + ["data position"] * (data_state(folder) != data_state(other))
            wrong += [f"{folder.name} verifies but differs in {', '.join(differences)}"] * bool(differences)
    return wrong


def data_state(folder: Path) -> dict[str, Any]:
    return merge_states([rank["data"] for rank in CheckpointReader(folder).rank_states])


def compare(reference: Path, run: Path) -> list[str]:
    def curve(run: Path) -> list[dict[str, Any]]:
        return [{tag: row[tag] for tag in row if not tag.startswith(TIMING_TAGS)} for row in rows(run)]

    expected, actual = curve(reference), curve(run)
    problems = [f"step {a['step']}: {b} instead of {a}" for a, b in zip(expected, actual, strict=False) if a != b]
    if len(expected) != len(actual):
        problems.append(f"{len(actual)} lines of metrics instead of {len(expected)}")
    tags = read_events(reference).Tags()["scalars"]
    if read_events(run).Tags()["scalars"] != tags:
        problems.append("TensorBoard has other tags")
    differing_tags = [
        tag for tag in tags if not tag.startswith(TIMING_TAGS) and scalars(run, tag) != scalars(reference, tag)
    ]
    return problems + [f"TensorBoard has other values of {tag}" for tag in differing_tags]


if __name__ == "__main__":
    sys.exit(main())
