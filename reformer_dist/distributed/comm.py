"""Collectives of a process group, with counts of the bytes and the seconds they take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


class CommStats:
    """Bytes sent to other ranks and seconds spent, by phase."""

    def __init__(self) -> None:
        self.bytes_sent: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the host seconds of the block to `phase`; exact only without overlap."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start  # type: ignore[assignment]

    def clear(self) -> None:
        self.bytes_sent.clear()
        self.seconds.clear()


@dataclass(frozen=True)
class SplitRows:
    """Rows to send, sorted by destination rank, and how many each rank sends back."""

    rows: Tensor
    """[sum(input_splits), width], those for rank 0 first."""
    input_splits: list[int]
    """Rows to send to each rank."""
    output_splits: list[int]
    """Rows to receive from each rank."""


class Work:
    """An all-to-all in flight."""

    def __init__(self, sent: Tensor, received: Tensor, work: dist.Work | None) -> None:
        # the input must stay alive until the collective is done
        self._sent, self._received, self._work = sent, received, work

    def wait(self) -> Tensor:
        """Returns the rows received from all ranks, ordered by rank."""
        if self._work is not None:
            self._work.wait()
        return self._received


class CommGroup:
    """Rank `index` of the `size` ranks of one process group. Every rank makes the same calls in the same order.

    With a single rank all calls are local, and `group` may be None.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, size: int, index: int, stats: CommStats, *, overlaps: bool = True
    ) -> None:
        """overlaps: `all_to_all_v` returns at once; otherwise it blocks until the rows have arrived."""
        self.group, self.size, self.index, self.stats = group, size, index, stats
        self._overlaps = overlaps

    def all_to_all_v(self, send: SplitRows, phase: str) -> Work:
        """Sends each rank its rows."""
        rows = send.rows
        if self.size == 1:
            return Work(rows, rows, None)
        to_others = rows.shape[0] - send.input_splits[self.index]
        self.stats.bytes_sent[phase] += to_others * rows.shape[1] * rows.element_size()
        received = torch.empty(sum(send.output_splits), rows.shape[1], dtype=rows.dtype, device=rows.device)
        work = dist.all_to_all_single(
            received, rows, send.output_splits, send.input_splits, group=self.group, async_op=self._overlaps
        )
        return Work(rows, received, work)

    def all_to_all(self, blocks: Tensor, phase: str) -> Tensor:
        """Sends block p of [size, ...] to rank p. Returns the received blocks, ordered by rank."""
        blocks = blocks.contiguous()
        if self.size == 1:
            return blocks
        self.stats.bytes_sent[phase] += blocks.numel() * blocks.element_size() * (self.size - 1) // self.size
        received = torch.empty_like(blocks)
        # as bytes, since gloo does not support every dtype
        dist.all_to_all_single(received.view(torch.uint8), blocks.view(torch.uint8), group=self.group)
        return received

    def all_reduce(self, values: Tensor, phase: str) -> Tensor:
        """Sums a small tensor over the ranks, in place."""
        if self.size == 1:
            return values
        self.stats.bytes_sent[phase] += values.numel() * values.element_size()
        dist.all_reduce(values, group=self.group)
        return values

    def all_gather(self, block: Tensor, phase: str) -> Tensor:
        """Returns the blocks of all ranks, [size, ...]."""
        return self.all_to_all(block.unsqueeze(0).expand(self.size, *block.shape), phase)
