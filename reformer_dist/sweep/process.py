"""A trial's process: the command that a user would type, with a log, a lock, and an end at the driver's end."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from reformer_dist.sweep.placement import Placement
from reformer_dist.sweep.state import take_lock

LOG, LOCK = "trial.log", "trial.lock"
PREEMPTED = 75
KILLED = 128  # a shell's status of a process that signal n ended is 128 + n
LOG_TAIL = 65536
SET_DEATH_SIGNAL = 1  # of prctl


class TrialProcess:
    """Runs in a session of its own, so that the terminal's Ctrl-C comes to the driver alone."""

    def __init__(self, arguments: list[str], folder: Path, place: Placement, lock: int) -> None:
        """arguments: what follows `python`; lock: of the trial, which the process holds on after the driver."""
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
                env=os.environ | place.environment,
                start_new_session=True,
                pass_fds=[lock],
                preexec_fn=_die_with(os.getpid()),
            )
        os.close(lock)

    def status(self) -> int | None:
        """Exit status as a shell gives it; None while the process runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else KILLED - code

    def stop(self) -> None:
        """Asks for a save and the end."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the process and whatever it started, at once."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            for each in [*process.children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()

    def last_words(self) -> str:
        """Why it ended, by its log: its error, or its last line."""
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - LOG_TAIL))
            lines = log.read().decode(errors="replace").splitlines()
        return last_error(lines)


def open_lock(folder: Path) -> int | None:
    """The lock of a trial, None while a process of an earlier driver holds it."""
    return take_lock(folder / LOCK)


def last_error(lines: list[str]) -> str:
    """The last line that tells an error, else the last line."""
    said = [line.strip() for line in lines if line.strip()]
    for pattern in (r"error: ", r"[\w.]*(Error|Exception|Interrupt)\b"):
        for line in reversed(said):
            if re.match(pattern, line):
                return line.removeprefix("error: ")
    return said[-1] if said else "it said nothing"


def _die_with(driver: int) -> Callable[[], None] | None:
    """What a new process does first: it asks the kernel for SIGTERM at the driver's death (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(SET_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != driver:
            os._exit(KILLED + signal.SIGTERM)

    return ask
