"""Fixtures: an uninterrupted run to compare others with, and the log."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from run_helpers import train

from reformer_dist.distributed.runtime import Runtime
from reformer_dist.process.log import logger


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, job: Runtime) -> Path:
    """A run of 6 steps with checkpoints of steps 3 and 6, evaluated on all held-out text; not to be changed."""
    observed = ("trainer.eval_every=3", "data.eval_rows=0", "trainer.sample_every=6", "trainer.sample_tokens=5")
    return train(job, tiny_data, tmp_path_factory.mktemp("runs") / "whole", *observed)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger.name)
    return caplog
