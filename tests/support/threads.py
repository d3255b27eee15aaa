"""Ranks as threads of this process: what they say to each other goes over a list instead of gloo."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any, TypeVar

import torch

from reformer_dist.distributed.runtime import Runtime

T = TypeVar("T")


@dataclass
class Meeting:
    """Where the threads meet; one that never comes breaks the meeting instead of stopping the test."""

    size: int
    barrier: Barrier = field(init=False)
    said: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = Barrier(self.size, timeout=20)
        self.said = [None] * self.size

    def gather(self, rank: int, thing: Any) -> list[Any]:
        self.said[rank] = thing
        self.barrier.wait()
        things = list(self.said)
        self.barrier.wait()
        return things


@dataclass(frozen=True)
class ThreadRuntime(Runtime):
    meeting: Meeting

    def gather(self, thing: Any) -> list[Any]:
        return self.meeting.gather(self.rank, thing)

    def broadcast(self, thing: Any) -> Any:
        return self.gather(thing)[0]

    def sum(self, numbers: list[float]) -> list[float]:
        return [sum(column) for column in zip(*self.gather(numbers), strict=True)]

    def barrier(self) -> None:
        self.gather(None)


def on_ranks(size: int, action: Callable[[Runtime], T]) -> list[T | Exception]:
    """What `action` returns, or raises, on each of `size` ranks."""
    meeting = Meeting(size)

    def run(rank: int) -> T | Exception:
        try:
            return action(ThreadRuntime(rank, rank, size, torch.device("cpu"), None, meeting))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
