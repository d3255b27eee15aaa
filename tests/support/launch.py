"""Runs scripts and modules as jobs of one or more processes, as a user would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from support.forks import fork_ranks

TESTS = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
GRACE = 35  # seconds that torchrun may take to end its workers


def run_ranks(
    target: Path | str,
    world_size: int,
    args: Sequence[object] = (),
    *,
    timeout: float = 180,
    env: Mapping[str, str] | None = None,
    fails: bool = False,
    forked: bool = False,
) -> str:
    """Runs a script (Path) or module (str) on `world_size` processes; returns all that they printed.

    forked: the processes are forked from one that has imported torch and DeepSpeed, which saves seconds wherever
        the start itself is not tested. Otherwise torchrun starts them, or this process if there is one.

    Fails, showing the output, where the job does not end in time, or does not end as it should: with status 0, or
    1 if it `fails`.
    """
    words = [str(arg) for arg in args]
    if forked:
        status, output = fork_ranks(target, world_size, words, timeout, dict(env or {}))
    else:
        status, output = _run(_command(target, world_size) + words, timeout, env or {})
    assert status == int(fails), f"ended with status {status}:\n{output}"
    return output


def run_command(name: str, *args: object, status: int = 0, timeout: float = 180, **env: str) -> str:
    """Runs an installed command; returns all that it printed. Fails unless it ends with that status."""
    ended, output = _run([str(BIN / name), *map(str, args)], timeout, env)
    assert ended == status, f"ended with status {ended}:\n{output}"
    return output


def free_port(count: int = 1) -> int:
    """The first of `count` ports in a row that nothing listens on."""
    while True:
        with ExitStack() as taken:
            first = taken.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            with suppress(OSError):
                for port in range(first + 1, first + count):
                    taken.enter_context(socket.create_server(("127.0.0.1", port)))
                return first


def _run(command: list[str], timeout: float, env: Mapping[str, str]) -> tuple[int, str]:
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])  # the helpers, and the package beside them
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | dict(env)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=settings,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"still running after {timeout} s:\n{_end(process)}") from None
    return process.returncode, output


def _command(target: Path | str, world_size: int) -> list[str]:
    what = [str(target)] if isinstance(target, Path) else ["-m", target]
    if world_size == 1:
        return [sys.executable, *what]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    return [sys.executable, *launcher, *what]


def _end(process: subprocess.Popen[str]) -> str:
    """Ends the launcher, which ends its workers (they have sessions of their own); then whatever is left."""
    process.terminate()
    try:
        output, _ = process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return output
