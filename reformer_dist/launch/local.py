"""launcher=local: starts the ranks of a job on this machine, forwards signals, and returns their exit status.

The ranks run under PyTorch's elastic agent, which torchrun uses as well. torchrun itself would turn every status
into 1 and print a page about it; here the status of a rank is that of the job, and only the ranks print.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from types import FrameType

import torch
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from reformer_dist.config import LauncherConfig
from reformer_dist.process import stdio
from reformer_dist.process.cores import usable_cores
from reformer_dist.process.exit_status import KILLED, PREEMPTED
from reformer_dist.process.signals import LAUNCHER, SIGNALS, handling, launcher_id

LOCALHOST = "127.0.0.1"
# signal received: signal that the ranks get. They must stop at all of these, and a rank that Python still starts
# would report SIGINT with a traceback
FORWARDED = dict.fromkeys(SIGNALS, signal.SIGTERM) | {signal.SIGQUIT: signal.SIGQUIT}
NO_SIGNAL = "none"  # that the agent handles
POLL_SECONDS = 0.05


def n_ranks(launcher: LauncherConfig) -> int:
    """Ranks of a job on this machine."""
    return launcher.nproc_per_node or max(1, torch.cuda.device_count())


def run_ranks(module: str, arguments: Sequence[str], launcher: LauncherConfig, advice: str) -> int:
    """Runs `python -m module arguments...` as the ranks of one job; returns the exit status of the job.

    That is the status of the first rank that did not exit with 0. The signals of FORWARDED reach all ranks, also
    those that are still to start; if they end a rank that does not handle them yet, the status is PREEMPTED. If a
    rank is killed by any other signal, all are restarted, up to launcher.max_restarts times. A signal in the
    meantime ends the job with PREEMPTED, since a new start would resume. SIGQUIT kills the ranks.

    advice: what the user should do if a rank was killed.
    """
    # the agent would repeat what the ranks have reported
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = NO_SIGNAL
    os.environ[LAUNCHER] = launcher_id()
    ranks = n_ranks(launcher)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(ranks)))
    status = 0
    forwarder = _Forwarder()
    with forwarder.listen():
        for restarts_left in reversed(range(launcher.max_restarts + 1)):
            job = _Job((sys.executable, "-m", module, *arguments), ranks, forwarder)
            status = job.run()
            if not job.killed_rank:
                break
            if forwarder.first is not None and restarts_left:
                return status_of(forwarder.first)
            reaction = advice if restarts_left == 0 else "restarting all ranks"
            stdio.write(sys.stderr, f"error: {job.killed_rank}; {reaction}\n")
    return status


def status_of(signum: signal.Signals) -> int:
    """Exit status of a job that a signal ended before its ranks could handle it."""
    return PREEMPTED if signum in SIGNALS else KILLED + signum


def threads_per_rank(ranks: int) -> int:
    """An equal part of the usable cores."""
    return max(1, usable_cores() // ranks)


class _Forwarder:
    """Forwards signals to the ranks of the agent that runs, also while it starts or restarts them."""

    def __init__(self) -> None:
        self.agent: LocalElasticAgent | None = None
        self.first: signal.Signals | None = None
        """First signal received."""
        # put() may interrupt itself, as handlers do; a lock, or the start of a thread, may not
        self._received: SimpleQueue[signal.Signals | None] = SimpleQueue()
        self._has_ended = threading.Event()

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Receives the signals of FORWARDED, in the main thread only."""
        # a thread, since the agent starts the ranks in the main thread, after a handler has returned
        thread = threading.Thread(target=self._forward, name="signals", daemon=True)
        thread.start()
        try:
            with handling(FORWARDED, self._on_signal):
                yield
        finally:
            self._has_ended.set()
            self._received.put(None)
            thread.join()

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        received = signal.Signals(signum)
        is_repeated = received is signal.SIGINT and self.first is not None
        self.first = self.first or received
        # a second Ctrl-C ends ranks that save
        self._received.put(received if is_repeated else FORWARDED[received])

    def _forward(self) -> None:
        while (signum := self._received.get()) is not None:
            for pid in self._wait_for_ranks():
                with suppress(ProcessLookupError):
                    os.kill(pid, signum)

    def _wait_for_ranks(self) -> list[int]:
        """Process ids of the ranks, once all have been started; none if they never are."""
        while True:
            # read anew each time: the agent makes its list of workers again when it starts them
            workers = self.agent.get_worker_group().workers if self.agent else []
            pids = [worker.id for worker in workers if isinstance(worker.id, int)]
            if len(pids) == len(workers) > 0:
                return pids
            if self._has_ended.wait(POLL_SECONDS):
                return []


class _Job:
    """One start of the ranks."""

    def __init__(self, command: tuple[str, ...], ranks: int, forwarder: _Forwarder) -> None:
        self._command, self._ranks, self._forwarder = command, ranks, forwarder
        self.killed_rank = ""
        """Message with the rank that was killed, and the signal; empty if none was."""

    def run(self) -> int:
        with tempfile.TemporaryDirectory(prefix="reformer-") as logs:
            rendezvous = get_rendezvous_handler(
                RendezvousParameters("c10d", "localhost:0", uuid.uuid4().hex, 1, 1, local_addr=LOCALHOST)
            )
            spec = WorkerSpec(
                role="rank",
                local_world_size=self._ranks,
                rdzv_handler=rendezvous,
                entrypoint=self._command[0],
                args=self._command[1:],
                max_restarts=0,
                local_addr=LOCALHOST,
            )
            agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=logs))
            self._forwarder.agent = agent
            try:
                # a signal from now on reaches the ranks of this agent
                if self._forwarder.first is not None:
                    return status_of(self._forwarder.first)
                return self._status(agent.run().failures)
            finally:
                self._forwarder.agent = None
                rendezvous.shutdown()

    def _status(self, failures: dict[int, ProcessFailure]) -> int:
        if not failures:
            return 0
        # whole seconds: of ranks that ended within one, a killed rank is why the others failed
        rank, first = min(
            failures.items(), key=lambda item: (item[1].timestamp, item[1].exitcode != -signal.SIGKILL)
        )
        if first.exitcode >= 0:
            return first.exitcode
        killer = signal.Signals(-first.exitcode)
        if self._forwarder.first is not None and killer in (*SIGNALS, signal.SIGQUIT):
            return status_of(self._forwarder.first if killer in SIGNALS else killer)
        self.killed_rank = f"rank {rank} of {self._ranks} was killed by {killer.name}"
        return KILLED + killer
