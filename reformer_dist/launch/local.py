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
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
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
from reformer_dist.process.signals import LAUNCHER, handling

LOCALHOST = "127.0.0.1"
# signal received: signal that the ranks get. When the terminal closes they must stop, not die
FORWARDED = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT, signal.SIGHUP: signal.SIGTERM}
AGENT_SIGNALS = "SIGQUIT"  # the agent kills the ranks with the same signal
POLL_SECONDS = 0.05


def n_ranks(launcher: LauncherConfig) -> int:
    """Ranks of a job on this machine."""
    return launcher.nproc_per_node or max(1, torch.cuda.device_count())


def run_ranks(module: str, arguments: Sequence[str], launcher: LauncherConfig, advice: str) -> int:
    """Runs `python -m module arguments...` as the ranks of one job; returns the exit status of the job.

    That is the status of the first rank that did not exit with 0. SIGTERM, SIGINT and SIGHUP are forwarded to all
    ranks; if they kill a rank that does not handle them yet, the status is PREEMPTED. If a rank is killed by any
    other signal, all are restarted, up to launcher.max_restarts times.

    advice: what the user should do if a rank was killed.
    """
    # the agent would repeat what the ranks have reported
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = AGENT_SIGNALS
    os.environ[LAUNCHER] = str(os.getpid())
    ranks = n_ranks(launcher)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(ranks)))
    status = 0
    for restarts_left in reversed(range(launcher.max_restarts + 1)):
        job = _Job((sys.executable, "-m", module, *arguments), ranks)
        status = job.run()
        if not job.killed_rank or job.was_signalled:
            break
        reaction = advice if restarts_left == 0 else "restarting all ranks"
        stdio.write(sys.stderr, f"error: {job.killed_rank}; {reaction}\n")
    return status


def threads_per_rank(ranks: int) -> int:
    """An equal part of the usable cores."""
    return max(1, usable_cores() // ranks)


class _Job:
    """One start of the ranks."""

    def __init__(self, command: tuple[str, ...], ranks: int) -> None:
        self._command, self._ranks = command, ranks
        self.was_signalled = False
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

            def forward(signum: int, _: FrameType | None) -> None:
                self.was_signalled = True
                # in a thread: there may be no ranks yet, and the agent only starts them after this returns
                arguments = (agent, FORWARDED[signal.Signals(signum)])
                threading.Thread(target=_send_to_all, args=arguments, daemon=True).start()

            try:
                with handling(FORWARDED, forward):
                    return self._status(agent.run().failures)
            except SignalException as exit_signal:
                self.was_signalled = True
                return KILLED + exit_signal.sigval
            finally:
                rendezvous.shutdown()

    def _status(self, failures: dict[int, ProcessFailure]) -> int:
        if not failures:
            return 0
        rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
        if first.exitcode >= 0:
            return first.exitcode
        if self.was_signalled and -first.exitcode in FORWARDED.values():
            return PREEMPTED  # it had no handler yet
        self.killed_rank = f"rank {rank} of {self._ranks} was killed by {signal.Signals(-first.exitcode).name}"
        return KILLED - first.exitcode


def _send_to_all(agent: LocalElasticAgent, signum: int) -> None:
    workers = agent.get_worker_group().workers
    while not all(isinstance(worker.id, int) for worker in workers):
        time.sleep(POLL_SECONDS)
    for worker in workers:
        with suppress(ProcessLookupError):
            os.kill(worker.id, signum)
