"""Processes forked from a server that has imported torch, DeepSpeed and the package once per test session."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

from reformer_dist.process.signals import terminate_with_parent

PRELOAD = [
    "torch.distributed",
    "deepspeed",
    "reformer_dist.models",
    "reformer_dist.parallel",
    "reformer_dist.run.build",
]
TESTS = Path(__file__).resolve().parents[1]
END = 20.0  # seconds that ranks have to end after one of them failed, as torchrun gives them


def start_server() -> None:
    """Starts the server, of which a process has one: the first to ask for it decides what it has imported."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when the server loads OpenMP
    fork_context().set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()


def fork_context() -> ForkServerContext:
    """The context of the server, which never runs a thread: a fork would inherit the locks that it holds."""
    return multiprocessing.get_context("forkserver")


def fork_ranks(
    target: Path | str, world_size: int, args: list[str], timeout: float, env: dict[str, str]
) -> tuple[int, str]:
    """Runs a script or module as the ranks of a job, as torchrun does; returns the status and all output."""
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "WORLD_SIZE": str(world_size)}
    job["LOCAL_WORLD_SIZE"] = job["WORLD_SIZE"]
    with tempfile.NamedTemporaryFile() as output:
        ranks = []
        for rank in range(world_size):
            place = job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
            process = fork_context().Process(target=_become, args=(str(target), args, place | env, output.name))
            process.start()
            ranks.append(process)
        try:
            deadline = time.monotonic() + timeout
            while any(rank.exitcode is None for rank in ranks) and not any(rank.exitcode for rank in ranks):
                assert time.monotonic() < deadline, f"still running after {timeout} s:\n{_text(output.name)}"
                time.sleep(0.02)
            failed = [rank.exitcode for rank in ranks if rank.exitcode]
            for rank in ranks:
                if rank.exitcode is None:
                    rank.terminate()
            for rank in ranks:
                rank.join(END)
        finally:
            for rank in ranks:
                rank.kill()
        return (failed or [0])[0], _text(output.name)


def _become(target: str, args: list[str], env: dict[str, str], output: str) -> None:
    """Runs `target` as the main program of this process, its output appended to a file."""
    if bind := terminate_with_parent():  # the server, which ends with pytest
        bind()
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.setsid()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[:] = [target, *args]
    if target.endswith(".py"):
        sys.path[:0] = [str(Path(target).parent), str(TESTS)]
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


def _text(path: str) -> str:
    return Path(path).read_text(errors="replace")


def _free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])
