"""A new store for each start of a job, within the store that torchrun keeps across restarts.

When torchrun restarts the ranks of a job, its store still holds what the previous ones wrote: addresses that are
no longer in use, and reports of lost ranks. Its restart count identifies a start on one machine only, since an
agent does not count restarts that another machine caused. So rank 0 chooses a random name for each start, and
every other rank requests it.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistStoreError

POLL_SECONDS = 0.02
ROOT = "reformer"


def launcher_hosts_store() -> bool:
    """Whether the launcher hosts the store, as torchrun does; otherwise rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def connect(timeout: timedelta) -> Store:
    """Connects to the launcher's store."""
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timeout)


def rendezvous(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """The part of the store that belongs to this start. Every rank calls this.

    Raises DistStoreError if a rank does not arrive in time.
    """
    name = _publish_name(store, world_size, timeout) if rank == 0 else _request_name(store, rank, timeout)
    return PrefixStore(f"{ROOT}/{name}", store)


def _request_name(store: Store, rank: int, timeout: timedelta) -> str:
    """The request has a new id, which rank 0 of an earlier start can't have answered."""
    request = uuid.uuid4().hex
    store.set(f"{ROOT}/request/{rank}", request)
    answer = f"{ROOT}/answer/{request}"
    store.wait([answer], timeout)
    name = store.get(answer).decode()
    store.set(f"{ROOT}/acknowledged/{name}/{rank}", "")
    return name


def _publish_name(store: Store, world_size: int, timeout: timedelta) -> str:
    """Answers all requests, including stale ones, until each rank has acknowledged the name."""
    name = uuid.uuid4().hex
    answered: dict[int, bytes] = {}
    waiting = set(range(1, world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while waiting:
        for rank in sorted(waiting):
            if store.check([f"{ROOT}/acknowledged/{name}/{rank}"]):
                waiting.discard(rank)
            elif store.check([f"{ROOT}/request/{rank}"]):
                request = store.get(f"{ROOT}/request/{rank}")
                if answered.get(rank) != request:
                    store.set(f"{ROOT}/answer/{request.decode()}", name)
                    answered[rank] = request
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(waiting)))
            raise DistStoreError(f"timed out after {timeout.total_seconds():g} s waiting for ranks {ranks}")
        time.sleep(POLL_SECONDS)
    return name
