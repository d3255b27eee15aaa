"""One logger; only rank 0 speaks, unless something is wrong."""

from __future__ import annotations

import logging
import sys

from reformer_dist.distributed.runtime import env_rank

logger = logging.getLogger("reformer_dist")


def configure() -> None:
    """Plain lines on standard output: progress is what a user came for."""
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO if env_rank() == 0 else logging.ERROR)
