"""What all tests share. pytest puts the folder of a conftest.py on the path: hence `support` can be imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from support import forks
from support.rank_pool import RankPool
from support.tiny import write_tiny_dataset

from reformer_dist.distributed import runtime
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.process.log import logger

# the same examples in every run: a failure is a change of the code, never luck
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

# as a rank of a launcher's has it; these are tests of many tiny operations, which threads only slow down
torch.set_num_threads(1)

# kernels are made when they are imported: without a GPU, Triton's interpreter runs them on the CPU
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `cuda` where there is no such device; runs the files with `jobs`, the longest, first.

    xdist gives out files in this order, so that its workers end together.
    """
    long = {item.path for item in items if item.get_closest_marker("jobs")}
    items.sort(key=lambda item: item.path not in long)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """Before a command that is tested in this process starts it for workers of its own."""
    forks.start_server()


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """Undoes the logging of commands that a test runs in this process: it goes to the test's standard output."""
    handlers, propagate, level = list(logger.handlers), logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture(scope="module", autouse=True)
def linear_as_before() -> Iterator[None]:
    """Undoes what ZeRO stage 3 does to the process: DeepSpeed replaces the linear function of PyTorch."""
    linear = F.linear
    yield
    F.linear = linear


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset that no test changes."""
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def job() -> Iterator[Runtime]:
    """This process as a job of one."""
    yield runtime.start()
    runtime.stop()


@pytest.fixture(scope="session")
def run_on() -> Iterator[Callable[..., None]]:
    """run_on(size, case, **params) calls `case(runtime, **params)` on each of the session's `size` ranks."""
    pools: dict[int, RankPool] = {}

    def run(size: int, case: Callable[..., None], /, **params: Any) -> None:
        pools.setdefault(size, RankPool(size)).run(case, params)

    yield run
    for pool in pools.values():
        pool.close()
