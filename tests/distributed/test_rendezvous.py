"""Ranks that torchrun restarted share a store with their predecessors, but read nothing that those wrote."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from reformer_dist.distributed.rendezvous import ROOT, rendezvous

SOON = timedelta(seconds=20)


class Start:
    """The ranks of one start, as threads."""

    def __init__(self, store: dist.Store, world_size: int) -> None:
        self._store, self._world_size = store, world_size
        self.found: dict[int, dist.Store] = {}
        self._threads: list[threading.Thread] = []

    def come(self, rank: int) -> None:
        def work() -> None:
            # as in a process of its own: a client waits on its connection alone
            self.found[rank] = rendezvous(self._store.clone(), rank, self._world_size, SOON)

        self._threads.append(threading.Thread(target=work))
        self._threads[-1].start()

    def end(self) -> None:
        for thread in self._threads:
            thread.join(SOON.total_seconds())


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=SOON)


def rendezvous_all(store: dist.Store, order: list[int]) -> dict[int, dist.Store]:
    start = Start(store, len(order))
    for rank in order:
        start.come(rank)
    start.end()
    assert sorted(start.found) == sorted(order)
    return start.found


def test_each_start_has_a_part_that_is_new_and_the_same_for_all(store) -> None:
    # machines come and go between the starts, and ranks arrive as they like
    for order in ([0, 1, 2], [2, 1, 0], [1, 0], [3, 0, 2, 1], [0]):
        found = rendezvous_all(store, order)
        for rank, own in found.items():
            assert not own.check(["address/0"])
            own.set(f"arrived/{rank}", "")
        found[0].set("address/0", "here")
        for own in found.values():
            assert own.get("address/0") == b"here"
            assert all(own.check([f"arrived/{rank}"]) for rank in order)


def test_stale_requests_delay_nothing(store) -> None:
    """Rank 0 of a failed start never answered; that of the next answers, although the requests are stale."""
    for rank in (1, 2):
        store.set(f"{ROOT}/request/{rank}", "asked before")
    assert len(rendezvous_all(store, [0, 2, 1])) == 3


def test_a_rank_that_does_not_come_is_named(store) -> None:
    with pytest.raises(dist.DistStoreError, match="ranks 1, 2"):
        rendezvous(store, 0, 3, timedelta(seconds=0.1))
    with pytest.raises(dist.DistStoreError):
        rendezvous(store, 1, 3, timedelta(seconds=0.1))
