"""Ranks as threads of this process: what they say to each other goes over a list instead of gloo."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor

from reformer_dist.distributed.comm import CommGroup, CommStats, SplitRows, Work
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


class ThreadCommGroup(CommGroup):
    """Messages over a meeting of threads."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__(None, meeting.size, rank, CommStats())
        self._meeting = meeting

    def all_to_all_v(self, send: SplitRows, phase: str) -> Work:
        parts = send.rows.clone().split(send.input_splits)
        self._count(phase, parts)
        arrived = [theirs[self.index] for theirs in self._meeting.gather(self.index, parts)]
        assert [part.shape[0] for part in arrived] == send.output_splits
        return Work(send.rows, torch.cat(arrived), None)

    def all_to_all(self, blocks: Tensor, phase: str) -> Tensor:
        blocks = blocks.clone()
        self._count(phase, blocks.unbind())
        return torch.stack([theirs[self.index] for theirs in self._meeting.gather(self.index, blocks)])

    def all_reduce(self, values: Tensor, phase: str) -> Tensor:
        """Adds nothing to the stats."""
        return torch.stack(self._meeting.gather(self.index, values.clone())).sum(dim=0)

    def _count(self, phase: str, parts: tuple[Tensor, ...]) -> None:
        others = [part for rank, part in enumerate(parts) if rank != self.index]
        self.stats.bytes_sent[phase] += sum(part.numel() * part.element_size() for part in others)
