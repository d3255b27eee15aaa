"""Processes that a tool starts and may have to end: each in a session of its own, which ends whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class ChildProcess:
    """One such process, until its block is left.

    It writes into files: a pipe would stay open, and its reader wait, as long as anyone has inherited it.
    """

    def __init__(self, command: list[str], folder: Path) -> None:
        self.was_cut = False
        self._out = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115, closed behind the block
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdout=self._out,
            stderr=self._errors,
            text=True,
            cwd=folder,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, *_: Any) -> None:
        self._kill()
        self._out.close()
        self._errors.close()

    def lines(self, seconds: Callable[[], float]) -> Iterator[str]:
        """What it prints, line by line; it is cut where none comes for as long as `seconds` says after each."""
        end, begun = time.monotonic() + seconds(), ""
        with Path(self._out.name).open() as printed:
            while True:
                is_over = self._process.poll() is not None  # asked first, so that its last words are read
                *whole, begun = (begun + printed.read()).split("\n")
                yield from whole
                if is_over:
                    return
                if whole:
                    end = time.monotonic() + seconds()
                elif time.monotonic() > end:
                    self.was_cut = True
                    self._kill()
                else:
                    time.sleep(0.02)

    @property
    def failure(self) -> str | None:
        """How it ended, with the last line of its errors; None if well."""
        status = self._process.poll()
        if status == 0:
            return None
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        return f"ended with status {status}: {lines[-1] if lines else 'no message'}"

    def _kill(self) -> None:
        """The whole session, which may outlive its first process."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
