"""Child processes with a timeout, each in its own session so that its descendants are killed with it."""

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
    """A process that is killed when the context exits.

    Its output goes to files: a pipe would block its reader until every descendant has closed it.
    """

    def __init__(self, command: list[str], folder: Path) -> None:
        self.timed_out = False
        self._out = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115, closed by __exit__
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
        """Its output lines. Kills the process if none arrives within `seconds()` of the previous one."""
        deadline, partial = time.monotonic() + seconds(), ""
        with Path(self._out.name).open() as printed:
            while True:
                has_exited = self._process.poll() is not None  # checked before the read, to get all its output
                *complete, partial = (partial + printed.read()).split("\n")
                yield from complete
                if has_exited:
                    return
                if complete:
                    deadline = time.monotonic() + seconds()
                elif time.monotonic() > deadline:
                    self.timed_out = True
                    self._kill()
                else:
                    time.sleep(0.02)

    @property
    def failure(self) -> str | None:
        """Exit status and last line of stderr; None if it succeeded."""
        status = self._process.poll()
        if status == 0:
            return None
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        return f"exit status {status}: {lines[-1] if lines else 'no message'}"

    def _kill(self) -> None:
        """Kills the whole session, which may outlive its first process."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
