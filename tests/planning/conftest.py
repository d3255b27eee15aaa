"""One data set and one job for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.one_thread import one_thread
from support.tiny import write_tiny_dataset

from reformer_dist.distributed import runtime
from reformer_dist.distributed.runtime import Runtime

__all__ = ["one_thread"]


@pytest.fixture(scope="package")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="package")
def job() -> Iterator[Runtime]:
    yield runtime.start()
    runtime.stop()
