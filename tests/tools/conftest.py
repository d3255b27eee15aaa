"""Tools that run in the process of the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reformer_dist.process.log import logger


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """Commands configure the log for the process that is theirs, with the standard output of the moment."""
    handlers, propagate, level = list(logger.handlers), logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
