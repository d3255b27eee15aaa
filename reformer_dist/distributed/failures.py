"""Detection of lost ranks: when one is lost, every other rank exits soon, with one message that names it.

An error of a collective only reports a closed connection, and the peer that closed it may itself have exited
because of yet another rank's failure. Some ranks get no error: they wait for a live peer that waits as well. So
each rank has a thread that reports its status to the job's store as soon as any rank raises an alarm, whatever
the main thread is waiting for. A rank without a report is lost; one that failed has reported its error; one that
reports, but never reached the collective that others waited in, hangs.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import distributed_c10d

from reformer_dist.distributed.rendezvous import launcher_hosts_store
from reformer_dist.distributed.runtime import Runtime, SharedError
from reformer_dist.errors import PeerLost

POLL_SECONDS = 0.5  # between checks for an alarm; each is a small request
ALARM_POLL_SECONDS = 0.2  # between reads of the reports after an alarm
REPORT_SECONDS = 5.0  # for a rank to report after an alarm; its thread is late only on a very busy machine
MAIN_THREAD_GRACE_SECONDS = 5.0  # for the main thread to get an error after the monitor has a diagnosis
EXIT_SECONDS = 10.0  # for the main thread to close its files and exit afterwards
LOG_KEY = "failures/log"  # in the store: a line of JSON per report
MAX_MESSAGE_LENGTH = 500
# gloo raises plain RuntimeErrors, but names its source file in all of them
GLOO_MARKERS = ("gloo/transport/", "third_party/gloo/", "Gloo connectFullMesh")
COLLECTIVE_FILES = ("/torch/distributed/", "/deepspeed/comm/")
# code whose innermost frame waits for an asynchronous collective
WAITING_FILES = (str(Path(__file__).parent), "/deepspeed/")
LIBRARIES = ("/site-packages/", "/dist-packages/", "/lib/python")


class RankStatus(str, Enum):
    failed = "failed"
    """Raised an error that does not come from a collective."""
    collective_error = "collective_error"
    """Got an error from a collective."""
    waiting = "waiting"
    """Its main thread seems to be in a collective."""
    busy = "busy"
    """Its main thread is elsewhere."""
    acknowledged = "acknowledged"
    """Has a diagnosis, and no longer needs the store."""


@dataclass(frozen=True)
class RankReport:
    """A rank's report about itself; a later one replaces an earlier one."""

    rank: int
    status: RankStatus
    message: str = ""
    location: str = ""


@contextmanager
def detect_lost_ranks(runtime: Runtime, advice: str = "") -> Iterator[None]:
    """Wraps all collectives of a job. Raises PeerLost, which names the lost ranks, if a collective fails.

    Any other error is re-raised once the other ranks can read it. After an error that is not a SharedError, the
    process must exit; it is ended if it does not do so within seconds.

    advice: what the user should do, appended to the message.
    """
    if runtime.world_size == 1:
        yield
        return
    monitor = _Monitor(runtime, advice)
    try:
        yield
        runtime.barrier()  # a rank that exits early must not look like a lost one
    except SharedError:
        monitor.stop()
        raise
    except BaseException as error:
        if not is_collective_error(error):
            monitor.raise_alarm(RankReport(runtime.rank, RankStatus.failed, _summarize(error)), error)
            raise
        stack = list(traceback.walk_tb(error.__traceback__))[::-1]
        report = RankReport(runtime.rank, RankStatus.collective_error, _summarize(error), _location(stack))
        raise PeerLost(monitor.raise_alarm(report, error)) from error
    monitor.stop()


def is_collective_error(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is about the connection to other ranks."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, dist.DistError):
            return True
        if isinstance(cause, RuntimeError) and any(marker in str(cause) for marker in GLOO_MARKERS):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def explain_failure(reports: dict[int, RankReport], world_size: int) -> str:
    """The lost, failed or hanging ranks, from all reports that arrived in time."""
    by_rank = [report for _, report in sorted(reports.items())]
    causes = [
        f"rank {report.rank} of {world_size} failed: {report.message}"
        for report in by_rank
        if report.status is RankStatus.failed
    ]
    silent = [str(rank) for rank in range(world_size) if rank not in reports]
    if silent:
        ranks, verb = ("rank", "was") if len(silent) == 1 else ("ranks", "were")
        lost = f"{ranks} {', '.join(silent)} of {world_size} {verb} lost"
        causes.append(f"{lost}: exited without an error, or does not respond")
    if not causes and any("timed out" in report.message.lower() for report in by_rank):
        causes = [
            f"rank {r.rank} of {world_size} hangs at {r.location}: the others waited for it in a collective"
            for r in by_rank
            if r.status is RankStatus.busy
        ]
    if not causes:
        states = [f"rank {r.rank} at {r.location}: {r.message or r.status.value}" for r in by_rank]
        causes = [f"all {world_size} ranks are alive, but a collective failed among them: {'; '.join(states)}"]
    return "; ".join(causes)


class _Monitor:
    """A thread that reports for this rank to the job's store, and ends the process if its main thread does not."""

    def __init__(self, runtime: Runtime, advice: str) -> None:
        self._rank, self._world_size, self._advice = runtime.rank, runtime.world_size, advice
        self._main = threading.get_ident()
        store: Any = distributed_c10d._get_default_store()
        self._store = store.clone()  # a shared connection would queue after requests of the main thread
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        # an idle connection to the store's port, which closes when the process that hosts the store exits
        self._liveness_socket = socket.create_connection(address)
        self._is_store_lost = False
        self._reports: dict[int, RankReport] = {}
        self._acknowledged: set[int] = set()
        self._own_report: RankReport | None = None
        self._error: BaseException | None = None
        self._is_stopped = False
        self._main_thread_reported = threading.Event()  # the main thread has reported, or stopped the monitor
        self._has_diagnosis = threading.Event()
        self._diagnosis = ""
        threading.Thread(target=self._run, name="failures", daemon=True).start()

    def stop(self) -> None:
        """Normal, agreed shutdown: stops treating lost peers as failures."""
        self._is_stopped = True
        self._main_thread_reported.set()

    def raise_alarm(self, own_report: RankReport, error: BaseException) -> str:
        """Raises the alarm from the main thread; returns the diagnosis."""
        self._own_report, self._error = own_report, error
        self._main_thread_reported.set()
        if self._has_diagnosis.wait(2 * REPORT_SECONDS + MAIN_THREAD_GRACE_SECONDS):
            return self._diagnosis
        self._is_store_lost = True  # the monitor is blocked in a request
        return self._diagnose()

    def _run(self) -> None:
        with self._liveness_socket:
            self._watch_and_diagnose()
        if self._main_thread_reported.wait(MAIN_THREAD_GRACE_SECONDS):
            if self._is_stopped:
                return
            time.sleep(EXIT_SECONDS)
        self._end_process()

    def _watch_and_diagnose(self) -> None:
        while not self._main_thread_reported.wait(POLL_SECONDS) and not self._request("check", [LOG_KEY]):
            if self._is_store_lost:
                self._main_thread_reported.wait()  # losing the store alone does not end a job
        if self._is_stopped:
            return
        time.sleep(ALARM_POLL_SECONDS)  # a dying process closes its connections one at a time
        self._collect_reports()
        self._diagnosis = self._diagnose()
        self._hold_store_for_readers()
        self._has_diagnosis.set()

    def _collect_reports(self) -> None:
        """Returns when the reports of all ranks explain the failure, or after REPORT_SECONDS."""
        deadline = time.monotonic() + REPORT_SECONDS
        while not self._is_store_lost and time.monotonic() < deadline:
            self._write_own_report()
            self._read_reports()
            statuses = {report.status for report in self._reports.values()}
            is_explained = RankStatus.failed in statuses or statuses == {RankStatus.collective_error}
            if len(self._reports) == self._world_size and is_explained:
                return
            time.sleep(ALARM_POLL_SECONDS)

    def _write_own_report(self) -> None:
        if self._own_report is not None:
            if self._reports.get(self._rank) != self._own_report:
                self._append(self._own_report)
        elif self._rank not in self._reports:
            self._append(_inspect_thread(self._rank, sys._current_frames()[self._main]))

    def _hold_store_for_readers(self) -> None:
        """Keeps the rank that hosts the store alive until the others have read it."""
        self._append(RankReport(self._rank, RankStatus.acknowledged))
        deadline = time.monotonic() + REPORT_SECONDS
        while self._rank == 0 and not self._is_store_lost and time.monotonic() < deadline:
            self._read_reports()
            if self._acknowledged.issuperset(self._reports):
                return
            time.sleep(ALARM_POLL_SECONDS)

    def _diagnose(self) -> str:
        has_failed = any(report.status is RankStatus.failed for report in self._reports.values())
        if self._is_store_lost and not has_failed:
            host = "the job's launcher" if launcher_hosts_store() else f"rank 0 of {self._world_size}"
            cause = f"{host}, which hosts the job's store, was lost: exited without an error, or does not respond"
        else:
            cause = explain_failure(self._reports, self._world_size)
        return f"{cause}; {self._advice}" if self._advice else cause

    def _append(self, report: RankReport) -> None:
        self._request("append", LOG_KEY, json.dumps(asdict(report)) + "\n")

    def _read_reports(self) -> None:
        for line in (self._request("get", LOG_KEY) or b"").decode().splitlines():
            fields = json.loads(line)
            report = RankReport(**{**fields, "status": RankStatus(fields["status"])})
            if report.status is RankStatus.acknowledged:
                self._acknowledged.add(report.rank)
            else:
                self._reports[report.rank] = report

    def _request(self, method: str, *args: Any) -> Any:
        """A request to the store; None if the store is lost."""
        # checked first, because the store's client prints a long native stack trace before it raises
        self._is_store_lost = self._is_store_lost or _is_closed(self._liveness_socket)
        if not self._is_store_lost:
            try:
                return getattr(self._store, method)(*args)
            except RuntimeError:
                self._is_store_lost = True
        return None

    def _end_process(self) -> NoReturn:
        """Ends the process from this thread, because the main thread is blocked forever."""
        with suppress(Exception):
            sys.stdout.flush()
        with suppress(OSError):  # the reader may be gone
            if self._error is not None and not is_collective_error(self._error):
                traceback.print_exception(self._error)
            else:
                sys.stderr.write(f"error: {self._diagnosis}\n")
            sys.stderr.flush()
        os._exit(1)


def _is_closed(connection: socket.socket) -> bool:
    try:
        return bool(select.select([connection], [], [], 0)[0]) and connection.recv(1) == b""
    except OSError:
        return True


def _summarize(error: BaseException) -> str:
    """Type and first line of an error, since some libraries append long traces to it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:MAX_MESSAGE_LENGTH] if lines else type(error).__name__


def _inspect_thread(rank: int, frame: FrameType) -> RankReport:
    """A report from the current stack of the main thread."""
    stack = list(traceback.walk_stack(frame))
    is_waiting = any(part in _file(outer) for outer, _ in stack for part in COLLECTIVE_FILES)
    is_waiting = is_waiting or any(part in _file(frame) for part in WAITING_FILES)
    return RankReport(rank, RankStatus.waiting if is_waiting else RankStatus.busy, location=_location(stack))


def _location(stack: list[tuple[FrameType, int]]) -> str:
    """The innermost line outside of libraries, from frames with the innermost first."""
    outside = [(frame, line) for frame, line in stack if not any(part in _file(frame) for part in LIBRARIES)]
    frame, line = (outside or stack)[0]
    return f"{Path(_file(frame)).name}:{line} in {frame.f_code.co_name}"


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename
