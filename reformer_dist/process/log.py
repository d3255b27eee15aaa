"""The logger: rank 0 logs to standard output, other ranks only errors; a run also keeps a file for each rank."""

from __future__ import annotations

import logging
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from reformer_dist.distributed.environment import env_rank
from reformer_dist.process import stdio
from reformer_dist.process.live_line import live

logger = logging.getLogger("reformer_dist")
LOG_FORMAT = "%(asctime)s %(message)s"
MAX_BACKLOG = 1000  # records


class _Handler(logging.StreamHandler[TextIO]):
    def emit(self, record: logging.LogRecord) -> None:
        with live.hidden():
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Discards all further output if the reader is gone. logging would print a traceback for each line."""
        if stdio.is_disconnected(self.stream):
            stdio.silence(self.stream)
        else:
            super().handleError(record)


class _LogFile(logging.Handler):
    """Keeps records until it is given a file, and appends them to it. Gives the file up if it can't be written."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter(LOG_FORMAT))
        self._backlog: deque[logging.LogRecord] = deque(maxlen=MAX_BACKLOG)
        self._file: TextIO | None = None
        self._is_given_up = False

    def open(self, path: Path) -> None:
        """Raises OSError."""
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        while self._backlog:
            self.emit(self._backlog.popleft())

    def emit(self, record: logging.LogRecord) -> None:
        if self._file is None:
            if not self._is_given_up:
                self._backlog.append(record)
            return
        try:
            self._file.write(f"{self.format(record)}\n")
        except OSError as error:
            name, self._file, self._is_given_up = self._file.name, None, True
            logger.warning(f"{name}: can't be written ({error.strerror}); this rank logs to no file from here on")

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        super().close()


def configure(stream: TextIO | None = None) -> None:
    """Logs plain lines to a stream; None is standard output."""
    logger.handlers.clear()
    handler = _Handler(stream or sys.stdout)
    handler.setLevel(logging.INFO if env_rank() == 0 else logging.ERROR)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.addHandler(_LogFile())
    logger.propagate = False
    logger.setLevel(logging.INFO)


def open_log_file(path: Path) -> None:
    """Appends what this process has logged and will log to a file, with the time. Raises OSError."""
    for handler in logger.handlers:
        if isinstance(handler, _LogFile):
            handler.open(path)


def log_to_file(message: str) -> None:
    """Writes a message to the log file only: one that is printed elsewhere."""
    record = logger.makeRecord(logger.name, logging.ERROR, "", 0, message, (), None)
    for handler in logger.handlers:
        if isinstance(handler, _LogFile):
            handler.handle(record)
