"""Jobs that lose a rank in the midst of their collectives, all at once.

failing_ranks.py PLAN OUT     PLAN: JSON {name: [fate, its rank, number of ranks, time-out in seconds]}
                             OUT: JSON {name: for each rank {"status", "output"}}

The ranks are forked from this process, which has loaded torch for all of them. There is no launcher: torchrun
would end the ranks that are left by itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from reformer_dist.distributed import failures, runtime
from reformer_dist.errors import DataError, UserError
from reformer_dist.process.command import run_command

ADVICE = "begin again"
HEALTHY_STEPS = 20
FOREVER = 300  # seconds
GIVE_UP = 60  # seconds until all that is left is killed


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raises() -> None:
    raise ValueError("a bad number: 17\nand what a library writes below it")


def complains() -> None:
    raise DataError("shard 3: found by one rank alone")


def hangs() -> None:
    time.sleep(FOREVER)


def freezes() -> None:
    """Its watch can't answer either."""
    os.kill(os.getpid(), signal.SIGSTOP)


FATES: dict[str, Callable[[], None]] = {
    each.__name__: each for each in (killed, raises, complains, hangs, freezes)
}


def work(rank: int, fate: str, culprit: int) -> None:
    """Small collectives as training makes them, some of them in groups that are made without a time-out."""
    world_size = dist.get_world_size()
    group, pair = dist.new_group(), dist.new_group([world_size - 2, world_size - 1])
    patient = dist.new_group(timeout=timedelta(seconds=FOREVER))
    for step in range(HEALTHY_STEPS + 1):
        numbers = torch.full((world_size * 100,), float(rank))
        dist.all_to_all_single(torch.empty_like(numbers), numbers)
        if step == HEALTHY_STEPS and rank == culprit and fate in FATES:
            FATES[fate]()
        if step == HEALTHY_STEPS and (fate, world_size) == ("hangs", 4):
            dist.all_reduce(numbers, group=pair if rank >= 2 else patient)
        # a ring: gloo tells nothing to ranks that are no neighbours of the culprit
        dist.all_reduce(numbers, group=group)


def run_rank(fate: str, culprit: int, timeout: float) -> None:
    job = runtime.start(timedelta(seconds=timeout))
    with failures.detect_lost_ranks(job, ADVICE):
        work(job.rank, fate, culprit)
        if fate == "agreed":
            job.raise_together(UserError("no data") if job.rank == culprit else None)


def fork(output: Path, settings: dict[str, str], fate: str, culprit: int, timeout: float) -> int:
    child = os.fork()
    if child == 0:
        become_rank(output, settings, lambda: run_rank(fate, culprit, timeout))
    return child


def become_rank(output: Path, settings: dict[str, str], command: Callable[[], None]) -> NoReturn:
    try:
        os.environ.update(settings)
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        run_command(command)
    finally:
        os._exit(99)  # it should have ended itself


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def end_of(children: set[int], frozen: set[int]) -> dict[int, int]:
    """Status of each. What goes on for ever is killed, the frozen when the others are gone."""
    ended: dict[int, int] = {}
    deadline = time.monotonic() + GIVE_UP
    while children - ended.keys():
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            ended[child] = os.waitstatus_to_exitcode(status)
        elif children - ended.keys() <= frozen or time.monotonic() > deadline:
            for left in children - ended.keys():
                os.kill(left, signal.SIGKILL)
        time.sleep(0.02)
    return ended


def main(plan: dict[str, list[Any]], out: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    ranks: dict[tuple[str, int], int] = {}
    for name, (fate, culprit, world_size, timeout) in plan.items():
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world_size)}
        for rank in range(world_size):
            settings = job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks[name, rank] = fork(folder / f"{name}-{rank}", settings, fate, culprit, timeout)
    frozen = {ranks[name, culprit] for name, (fate, culprit, *_) in plan.items() if fate == "freezes"}
    ended = end_of(set(ranks.values()), frozen)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (_, _, world_size, _) in plan.items():
        left = [(ended[ranks[name, rank]], (folder / f"{name}-{rank}").read_text()) for rank in range(world_size)]
        found[name] = [{"status": status, "output": said} for status, said in left]
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), Path(scratch))
