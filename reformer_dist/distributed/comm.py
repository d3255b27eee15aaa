"""All-to-all messages between the ranks of a group, and the ledger of what they cost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


class Ledger:
    """Bytes sent to other ranks and seconds spent, by phase."""

    def __init__(self) -> None:
        self.bytes_sent: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the seconds of its body, on the host: exact where nothing overlaps."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start  # type: ignore[assignment]

    def clear(self) -> None:
        self.bytes_sent.clear()
        self.seconds.clear()


@dataclass(frozen=True)
class Parcel:
    """Rows to send, and how many come in return for them."""

    rows: Tensor
    """[sum(counts_out), width], those for rank 0 first."""
    counts_out: list[int]
    """Rows for each rank."""
    counts_in: list[int]
    """Rows that come from each rank."""


class Delivery:
    """Rows on their way."""

    def __init__(self, sent: Tensor, received: Tensor, work: dist.Work | None) -> None:
        # what is sent must live until it has arrived
        self._sent, self._received, self._work = sent, received, work

    def wait(self) -> Tensor:
        """The rows that all ranks have sent here, in order of ranks."""
        if self._work is not None:
            self._work.wait()
        return self._received


class Wire:
    """The ranks of one process group; rank `index` of `size` in it. Every rank makes the same calls in order.

    Where there is one rank, nothing travels, and the group may be None.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, size: int, index: int, ledger: Ledger, *, overlaps: bool = True
    ) -> None:
        """overlaps: messages travel while the caller goes on; else `send` waits for them."""
        self.group, self.size, self.index, self.ledger = group, size, index, ledger
        self._overlaps = overlaps

    def send(self, parcel: Parcel, phase: str) -> Delivery:
        """Sends every rank its rows."""
        rows = parcel.rows
        if self.size == 1:
            return Delivery(rows, rows, None)
        to_others = rows.shape[0] - parcel.counts_out[self.index]
        self.ledger.bytes_sent[phase] += to_others * rows.shape[1] * rows.element_size()
        received = torch.empty(sum(parcel.counts_in), rows.shape[1], dtype=rows.dtype, device=rows.device)
        work = dist.all_to_all_single(
            received, rows, parcel.counts_in, parcel.counts_out, group=self.group, async_op=self._overlaps
        )
        return Delivery(rows, received, work)

    def swap(self, blocks: Tensor, phase: str) -> Tensor:
        """Block p of [size, ...] goes to rank p; the result holds the block that each rank sent here."""
        blocks = blocks.contiguous()
        if self.size == 1:
            return blocks
        self.ledger.bytes_sent[phase] += blocks.numel() * blocks.element_size() * (self.size - 1) // self.size
        received = torch.empty_like(blocks)
        # gloo does not know every dtype, but it knows bytes
        dist.all_to_all_single(received.view(torch.uint8), blocks.view(torch.uint8), group=self.group)
        return received

    def sum(self, numbers: Tensor, phase: str) -> Tensor:
        """Sum over the ranks, in place; of few numbers."""
        if self.size == 1:
            return numbers
        self.ledger.bytes_sent[phase] += numbers.numel() * numbers.element_size()
        dist.all_reduce(numbers, group=self.group)
        return numbers

    def gather(self, block: Tensor, phase: str) -> Tensor:
        """[size, ...]: the block of every rank."""
        return self.swap(block.unsqueeze(0).expand(self.size, *block.shape), phase)
