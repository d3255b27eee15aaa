"""Starts the ranks of a job on this machine, passes signals on to them, and ends as they end.

PyTorch's elastic agent, the one inside torchrun, starts and watches the processes. torchrun itself would turn
every status into 1 and print a page about it; here a rank's status is the job's, and only the ranks speak.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import torch
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, ProcessFailure, SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from reformer_dist.config import LauncherConfig
from reformer_dist.process import stdio
from reformer_dist.process.cores import usable_cores
from reformer_dist.process.exit_status import KILLED, PREEMPTED
from reformer_dist.process.signals import LAUNCHER

HERE = "127.0.0.1"
# what comes here, and what the ranks get: one whose terminal is closed is told to stop, not to die
PASSED_ON = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT, signal.SIGHUP: signal.SIGTERM}
LEFT_TO_THE_AGENT = "SIGQUIT"  # which ends the ranks by the same signal
POLL = 0.05  # seconds


def n_ranks(launcher: LauncherConfig) -> int:
    """Ranks that a job on this machine has."""
    return launcher.nproc_per_node or max(1, torch.cuda.device_count())


def run_ranks(module: str, arguments: Sequence[str], launcher: LauncherConfig, advice: str) -> int:
    """Runs `python -m module arguments...` as the ranks of one job; returns the status to end with.

    That is the status of the rank that was the first to end with another than 0. SIGTERM, SIGINT and SIGHUP go to
    all ranks, which are waited for; where one can't hear them yet, and dies, the status is 75. After a rank was
    killed by a signal that did not come through here, all are started again, if launcher.max_restarts allows.

    advice: what the user should do where a rank was killed.
    """
    # an agent's own words about what the ranks have said already
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = LEFT_TO_THE_AGENT
    os.environ[LAUNCHER] = str(os.getpid())
    ranks = n_ranks(launcher)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(ranks)))
    status = 0
    for restarts_left in reversed(range(launcher.max_restarts + 1)):
        job = _Job((sys.executable, "-m", module, *arguments), ranks)
        status = job.run()
        if not job.loss or job.was_signalled:
            break
        what_now = advice if restarts_left == 0 else "all ranks start again"
        stdio.write(sys.stderr, f"error: {job.loss}; {what_now}\n")
    return status


def threads_per_rank(ranks: int) -> int:
    """A fair share of the cores that this process may use."""
    return max(1, usable_cores() // ranks)


class _Job:
    """The ranks, from their start to the end of all of them."""

    def __init__(self, command: tuple[str, ...], ranks: int) -> None:
        self._command, self._ranks = command, ranks
        self.was_signalled = False
        self.loss = ""
        """Which rank was killed, and how."""

    def run(self) -> int:
        with tempfile.TemporaryDirectory(prefix="reformer-") as logs:
            meeting = get_rendezvous_handler(
                RendezvousParameters("c10d", "localhost:0", uuid.uuid4().hex, 1, 1, local_addr=HERE)
            )
            spec = WorkerSpec(
                role="rank",
                local_world_size=self._ranks,
                rdzv_handler=meeting,
                entrypoint=self._command[0],
                args=self._command[1:],
                max_restarts=0,
                local_addr=HERE,
            )
            agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=logs))
            try:
                with self._signals_passed_on(agent):
                    return self._status(agent.run().failures)
            except SignalException as ended:
                self.was_signalled = True
                return KILLED + ended.sigval
            finally:
                meeting.shutdown()

    def _status(self, failures: dict[int, ProcessFailure]) -> int:
        if not failures:
            return 0
        rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
        if first.exitcode >= 0:
            return first.exitcode
        if self.was_signalled and -first.exitcode in PASSED_ON.values():
            return PREEMPTED  # it had not even begun to listen
        self.loss = f"rank {rank} of {self._ranks} was killed by {signal.Signals(-first.exitcode).name}"
        return KILLED - first.exitcode

    @contextmanager
    def _signals_passed_on(self, agent: LocalElasticAgent) -> Iterator[None]:
        def pass_on(signum: int, frame: FrameType | None) -> None:
            self.was_signalled = True
            # in a thread: there may be no ranks yet, and the agent goes on making them only after this returns
            threading.Thread(
                target=_send_to_all, args=(agent, PASSED_ON[signal.Signals(signum)]), daemon=True
            ).start()

        # under nohup, SIGHUP stays ignored
        heard = [signum for signum in PASSED_ON if signal.getsignal(signum) is not signal.SIG_IGN]
        before = {signum: signal.signal(signum, pass_on) for signum in heard}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def _send_to_all(agent: LocalElasticAgent, signum: int) -> None:
    workers = agent.get_worker_group().workers
    while not all(isinstance(worker.id, int) for worker in workers):
        time.sleep(POLL)
    for worker in workers:
        with suppress(ProcessLookupError):
            os.kill(worker.id, signum)
