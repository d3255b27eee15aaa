"""One small trained run that the tests of the commands share."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.launch import run_ranks
from support.tiny import tiny_overrides


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_data) -> Path:
    """A run directory of 6 steps with checkpoints of steps 3 and 6."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    run_ranks("reformer_dist.train", 1, tiny_overrides(tiny_data, run), forked=True)
    return run
