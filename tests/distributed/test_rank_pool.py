"""The pool of ranks that tests share reports what its cases did, on every rank, and keeps nothing of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from support.rank_pool import RankFailure, RankPool

from reformer_dist.distributed.mesh import make_mesh
from reformer_dist.distributed.runtime import Runtime


def add_ranks(runtime: Runtime, expected: float) -> None:
    assert runtime.sum([float(runtime.rank)]) == [expected]


def raise_on(runtime: Runtime, rank: int) -> None:
    if runtime.rank == rank:
        raise ValueError("a bad number: 17")
    runtime.barrier()


def raise_everywhere(runtime: Runtime) -> None:
    raise ValueError("a bad number: 17")


def exit_on(runtime: Runtime, rank: int) -> None:
    if runtime.rank == rank:
        os._exit(7)
    runtime.barrier()


def hang_on(runtime: Runtime, rank: int) -> None:
    if runtime.rank == rank:
        time.sleep(100)


def make_groups(runtime: Runtime) -> None:
    make_mesh(runtime, 1, 2)
    torch.set_default_dtype(torch.float64)


def find_nothing(runtime: Runtime) -> None:
    assert list(dist.distributed_c10d._world.pg_map) == [dist.group.WORLD]
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


def test_a_case_runs_on_every_rank(pool: RankPool) -> None:
    pool.run(add_ranks, {"expected": 1.0})
    with pytest.raises(RankFailure, match=r"^rank 0, 1 of 2: (.|\n)*AssertionError"):
        pool.run(add_ranks, {"expected": 2.0})


def test_a_rank_that_raises_is_quoted_and_the_others_do_not_wait_for_it(pool: RankPool) -> None:
    for _ in range(2):  # the pool starts again
        with pytest.raises(RankFailure, match=r"rank 1 of 2: Traceback(.|\n)*ValueError: a bad number: 17"):
            pool.run(raise_on, {"rank": 1})
    with pytest.raises(RankFailure) as caught:
        pool.run(raise_everywhere, {})
    assert str(caught.value).count("a bad number") == 2  # once as a message, once in the source line
    pool.run(add_ranks, {"expected": 1.0})


@pytest.mark.jobs
def test_a_rank_that_dies_or_hangs_is_named(pool: RankPool) -> None:
    with pytest.raises(RankFailure, match="rank 0 of 2: died with exit code 7"):
        pool.run(exit_on, {"rank": 0})
    pool.run(add_ranks, {"expected": 1.0})  # the ranks have imported this module
    with pytest.raises(RankFailure, match=r"rank 1 of 2: not done after 2 s\n(.|\n)*in hang_on"):
        pool.run(hang_on, {"rank": 1}, timeout=2)
    pool.run(add_ranks, {"expected": 1.0})


def test_a_case_leaves_nothing_to_the_next(pool: RankPool) -> None:
    pool.run(make_groups, {})
    pool.run(find_nothing, {})
