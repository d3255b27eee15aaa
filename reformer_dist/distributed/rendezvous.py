"""A store for this start of a job alone, inside the one that torchrun keeps for all its starts.

When torchrun starts the ranks of a job again, they find in its store what those before them have written:
addresses at which nobody listens any more, and who was lost then. Its count of restarts tells the starts apart on
one machine only; another, which starts its ranks again for company, does not count that. So rank 0 draws a name
for each start, and hands it to every rank that asks.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistStoreError

POLL = 0.02  # seconds
ROOT = "reformer"


def launcher_hosts_store() -> bool:
    """As torchrun does; else rank 0 hosts it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def connect(timeout: timedelta) -> Store:
    """To the launcher's store."""
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timeout)


def meet(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """Every rank calls this; returns the part of the store that is new to all of them.

    Raises DistStoreError where a rank does not come in time.
    """
    name = _hand_out(store, world_size, timeout) if rank == 0 else _ask(store, rank, timeout)
    return PrefixStore(f"{ROOT}/{name}", store)


def _ask(store: Store, rank: int, timeout: timedelta) -> str:
    """No rank 0 of an earlier start can answer: the question is new."""
    question = uuid.uuid4().hex
    store.set(f"{ROOT}/question/{rank}", question)
    answer = f"{ROOT}/answer/{question}"
    store.wait([answer], timeout)
    name = store.get(answer).decode()
    store.set(f"{ROOT}/heard/{name}/{rank}", "")
    return name


def _hand_out(store: Store, world_size: int, timeout: timedelta) -> str:
    """Answers whatever is asked, be it left from an earlier start, until each rank has heard the name."""
    name = uuid.uuid4().hex
    answered: dict[int, bytes] = {}
    waiting = set(range(1, world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while waiting:
        for rank in sorted(waiting):
            if store.check([f"{ROOT}/heard/{name}/{rank}"]):
                waiting.discard(rank)
            elif store.check([f"{ROOT}/question/{rank}"]):
                question = store.get(f"{ROOT}/question/{rank}")
                if answered.get(rank) != question:
                    store.set(f"{ROOT}/answer/{question.decode()}", name)
                    answered[rank] = question
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(waiting)))
            raise DistStoreError(f"timed out after {timeout.total_seconds():g} s waiting for ranks {ranks}")
        time.sleep(POLL)
    return name
