"""The logger: rank 0 logs at INFO, other ranks only errors."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from reformer_dist.distributed.environment import env_rank
from reformer_dist.process import stdio
from reformer_dist.process.live_line import live

logger = logging.getLogger("reformer_dist")


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


def configure() -> None:
    """Logs plain lines to standard output."""
    logger.handlers.clear()
    handler = _Handler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO if env_rank() == 0 else logging.ERROR)
