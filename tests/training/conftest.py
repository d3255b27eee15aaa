"""One data set and one uninterrupted run that the tests of this folder hold others against."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from run_helpers import train
from support.tiny import write_tiny_dataset

from reformer_dist.distributed import runtime
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.log import logger


@pytest.fixture(scope="package")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="package")
def job() -> Iterator[Runtime]:
    """This process as a job of one, computing as reproducibly as a rank with OMP_NUM_THREADS=1."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield runtime.start()
    runtime.stop()
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="package")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, job: Runtime) -> Path:
    """A run of 6 steps with checkpoints of steps 3 and 6, evaluated on all held-out text; not to be changed."""
    observed = ("trainer.eval_every=3", "data.eval_rows=0", "trainer.sample_every=6", "trainer.sample_tokens=5")
    return train(job, tiny_data, tmp_path_factory.mktemp("runs") / "whole", *observed)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger.name)
    return caplog
