"""Jobs of several gloo ranks that stay alive for a whole test session.

A launch starts an interpreter and imports torch once per rank and test. Here the ranks of each world size are
forked once, from a server that has imported everything, and then run one case after another.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from reformer_dist.distributed.runtime import Runtime
from support.forks import fork_context

TIMEOUT = 60.0  # seconds per case
GRACE = 2.0  # seconds that the other ranks have to end a case after one of them failed
START_TIMEOUT = 120.0

Case = Callable[..., None]


class RankFailure(AssertionError):
    """A case failed on at least one rank; the message holds the report of each rank that failed."""


class RankPool:
    """`size` ranks of one job, started by the first case and restarted by the first after a failure."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[tuple[BaseProcess, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, case: Case, params: dict[str, Any], timeout: float = TIMEOUT) -> None:
        """Calls `case(runtime, **params)` on every rank. `case` is imported there: a function of a module.

        Raises RankFailure with the traceback of each rank that raised, and names the ranks that died or did not
        end within `timeout` seconds.
        """
        if not self._ranks:
            self._start()
        job = (sys.path, case.__module__, case.__qualname__, params)
        for _, connection in self._ranks:
            with suppress(OSError):  # a rank that died since the last case: its report names it
                connection.send(job)
        reports = self._collect(timeout)
        if any(reports):
            self.close()
            raise RankFailure("\n".join(self._describe(reports)))

    def _describe(self, reports: list[str]) -> Iterator[str]:
        """Each different report once, with its ranks."""
        for report in dict.fromkeys(filter(None, reports)):
            ranks = ", ".join(str(rank) for rank, other in enumerate(reports) if other == report)
            yield f"rank {ranks} of {self.size}: {report}"

    def close(self) -> None:
        """Ends the ranks, whatever they are doing."""
        for process, connection in self._ranks:
            process.kill()
            process.join()
            connection.close()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()

    def _start(self) -> None:
        context = fork_context()
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, Path(self._folder.name), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        if any(reports := self._collect(START_TIMEOUT)):
            self.close()
            raise RankFailure("the ranks did not start\n" + "\n".join(self._describe(reports)))

    def _collect(self, timeout: float) -> list[str]:
        """One report per rank, empty where the case ended well."""
        reports: list[str | None] = [None] * self.size
        deadline = time.monotonic() + timeout
        while None in reports and (left := deadline - time.monotonic()) > 0:
            waiting = {self._ranks[rank][1]: rank for rank, report in enumerate(reports) if report is None}
            for connection in wait(list(waiting), left):
                rank = waiting[connection]  # type: ignore[index]
                reports[rank] = self._receive(rank)
                if reports[rank]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        failed = any(reports)
        for rank, report in enumerate(reports):
            if report is None:
                reports[rank] = "still waiting" if failed else f"not done after {timeout:g} s\n{self._stack(rank)}"
        return [report or "" for report in reports]

    def _receive(self, rank: int) -> str:
        process, connection = self._ranks[rank]
        try:
            return connection.recv()
        except (EOFError, ConnectionError):
            process.join()
            return f"died with exit code {process.exitcode}"

    def _stack(self, rank: int) -> str:
        """The Python stack of a rank that hangs."""
        assert self._folder is not None and self._ranks[rank][0].pid is not None
        path = Path(self._folder.name) / f"stack{rank}"
        os.kill(self._ranks[rank][0].pid, signal.SIGUSR1)
        deadline = time.monotonic() + GRACE
        while not path.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.1)  # the frames after the first
        return path.read_text()


def _serve(rank: int, size: int, folder: Path, connection: Connection) -> None:
    """The main function of a rank: reports when it has joined and after each case, until the pipe closes."""
    torch.set_num_threads(1)
    with (folder / f"stack{rank}").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        store = dist.FileStore(str(folder / "store"), size)
        # longer than any case: the pool ends ranks that wait for each other
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=30))
        runtime = Runtime(rank, rank, size, torch.device("cpu"), None)
        connection.send("")
        while True:
            try:
                path, module, name, params = connection.recv()
            except EOFError:
                os._exit(0)
            connection.send(_report(runtime, path, module, name, params))


def _report(runtime: Runtime, path: list[str], module: str, name: str, params: dict[str, Any]) -> str:
    """Runs a case; returns its traceback if it raised. Destroys the process groups that it created."""
    sys.path[:] = path
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    try:
        __import__(module)
        getattr(sys.modules[module], name)(runtime, **params)
    except BaseException:
        return traceback.format_exc()
    groups = dist.distributed_c10d._world.pg_map
    for group in [group for group in groups if group is not dist.group.WORLD]:
        dist.destroy_process_group(group)
    return ""
