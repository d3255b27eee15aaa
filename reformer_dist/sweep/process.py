"""The process of a trial: runs its command line with a log and a lock, and stops if the driver dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from reformer_dist.fs.lock import acquire_lock
from reformer_dist.process.exit_status import KILLED
from reformer_dist.process.signals import terminate_with_parent
from reformer_dist.sweep.placement import Placement

LOG, LOCK = "trial.log", "trial.lock"
LOG_TAIL = 65536


class TrialProcess:
    """Runs in its own session, so that Ctrl-C in the terminal reaches only the driver."""

    def __init__(self, arguments: list[str], folder: Path, placement: Placement, lock: int) -> None:
        """arguments: Python arguments; lock: descriptor of the trial's lock, inherited by the process."""
        self.log = folder / LOG
        with self.log.open("ab") as log:
            log.write(f"$ python {' '.join(arguments)}\n".encode())
            self._log_start = log.tell()
            log.flush()
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | placement,
                start_new_session=True,
                pass_fds=[lock],
                preexec_fn=_terminate_with_driver(os.getpid()),
            )
        os.close(lock)

    def status(self) -> int | None:
        """Exit status as a shell reports it; None while the process runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else KILLED - code

    def stop(self) -> None:
        """Requests a save and exit."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kills the process and its descendants."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            for member in [*process.children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    member.kill()

    def last_error(self) -> str:
        """The error in the log of this process, or its last line."""
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - LOG_TAIL))
            lines = log.read().decode(errors="replace").splitlines()
        return find_error(lines)


def open_lock(folder: Path) -> int | None:
    """Takes the lock of a trial; None while a process of an earlier driver holds it."""
    return acquire_lock(folder / LOCK)


def find_error(lines: list[str]) -> str:
    """The last line that reports an error, else the last line."""
    output = [line.strip() for line in lines if line.strip()]
    for pattern in (r"error: ", r"[\w.]*(Error|Exception|Interrupt)\b"):
        for line in reversed(output):
            if re.match(pattern, line):
                return line.removeprefix("error: ")
    return output[-1] if output else "no output"


def _terminate_with_driver(driver: int) -> Callable[[], None] | None:
    """A preexec function after which the process receives SIGTERM when the driver dies (Linux only)."""
    terminate = terminate_with_parent()
    if terminate is None:
        return None

    def before_exec() -> None:
        terminate()
        if os.getppid() != driver:
            os._exit(KILLED + signal.SIGTERM)

    return before_exec
