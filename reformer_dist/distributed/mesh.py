"""Ranks in a grid: which of them hold one sequence, and which of those exchange heads or buckets.

Consecutive ranks share a sequence; among them, consecutive ones exchange buckets, which carry more bytes and so
belong inside a node. Slices of the sequence are dealt so that the ranks of a head group hold a contiguous part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from reformer_dist.distributed.comm import Ledger, Wire
from reformer_dist.distributed.runtime import Runtime


@dataclass(frozen=True)
class SequenceGrid:
    """This rank's place among the `heads` x `buckets` ranks that share its sequences."""

    heads: int
    buckets: int
    dp_rank: int
    dp_size: int
    head_rank: int
    bucket_rank: int
    head_wire: Wire
    bucket_wire: Wire
    sequence_wire: Wire
    ledger: Ledger

    @property
    def size(self) -> int:
        return self.heads * self.buckets

    @property
    def slice_index(self) -> int:
        """Which slice of the sequence is this rank's."""
        return self.bucket_rank * self.heads + self.head_rank

    def rank_of_slice(self, index: int) -> int:
        """The rank, within the sequence group, that holds a slice."""
        bucket_rank, head_rank = divmod(index, self.heads)
        return head_rank * self.buckets + bucket_rank


def make_grid(runtime: Runtime, heads: int, buckets: int, *, overlaps: bool = True) -> SequenceGrid:
    """Makes the process groups; every rank calls this. The world is a multiple of heads * buckets."""
    size = heads * buckets
    dp_rank, place = divmod(runtime.rank, size)
    head_rank, bucket_rank = divmod(place, buckets)
    ledger = Ledger()
    found: dict[str, Wire] = {}

    def join(name: str, members: list[int]) -> None:
        # every rank must help to make every group, also those of others
        group = dist.new_group(members) if len(members) > 1 else None
        if runtime.rank in members:
            found[name] = Wire(group, len(members), members.index(runtime.rank), ledger, overlaps=overlaps)

    for first in range(0, runtime.world_size, size):
        join("sequence", list(range(first, first + size)))
        for b in range(buckets):
            join("heads", [first + h * buckets + b for h in range(heads)])
        for h in range(heads):
            join("buckets", [first + h * buckets + b for b in range(buckets)])
    return SequenceGrid(
        heads=heads,
        buckets=buckets,
        dp_rank=dp_rank,
        dp_size=runtime.world_size // size,
        head_rank=head_rank,
        bucket_rank=bucket_rank,
        head_wire=found["heads"],
        bucket_wire=found["buckets"],
        sequence_wire=found["sequence"],
        ledger=ledger,
    )
