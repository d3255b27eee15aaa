"""One logger; only rank 0 speaks, unless something is wrong."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from reformer_dist.distributed.runtime import env_rank
from reformer_dist.process import stdio

logger = logging.getLogger("reformer_dist")


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:
        """Falls silent for good where nobody reads any more; logging would print a page about each line."""
        if stdio.is_unread(self.stream):
            stdio.silence(self.stream)
        else:
            super().handleError(record)


def configure() -> None:
    """Plain lines on standard output: progress is what a user came for."""
    logger.handlers.clear()
    handler = _Handler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO if env_rank() == 0 else logging.ERROR)
