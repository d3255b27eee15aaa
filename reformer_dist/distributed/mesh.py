"""The mesh of ranks: data parallel, then heads, then buckets.

Consecutive ranks share a sequence. Among them, consecutive ranks form a bucket group, which moves the most bytes
and so belongs inside a node. Slices of the sequence are assigned so that each head group holds a contiguous part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from reformer_dist.distributed.comm import CommGroup, CommStats
from reformer_dist.distributed.runtime import Runtime


@dataclass(frozen=True)
class SequenceMesh:
    """This rank's coordinates in a mesh of `dp_size` x `heads` x `buckets` ranks, and its process groups.

    dp: data parallel. Each of the `dp_size` groups of `heads * buckets` ranks trains on its own sequences.
    heads: an all-to-all before attention trades slices of the sequence for attention heads (as Ulysses does), so
        that each rank of `head_group` computes `1 / heads` of the heads.
    buckets: the ranks of `bucket_group` have the same heads. Each token is sent to the ranks that need it as
        a query or a key.
    """

    heads: int
    buckets: int
    dp_rank: int
    dp_size: int
    head_rank: int
    bucket_rank: int
    head_group: CommGroup
    bucket_group: CommGroup
    sequence_group: CommGroup
    """All `heads * buckets` ranks that share this rank's sequences."""
    stats: CommStats
    """Of the three groups together."""

    @property
    def size(self) -> int:
        return self.heads * self.buckets

    @property
    def slice_index(self) -> int:
        """Index of this rank's slice of the sequence."""
        return self.bucket_rank * self.heads + self.head_rank

    def rank_of_slice(self, index: int) -> int:
        """The rank, within the sequence group, that holds slice `index`."""
        bucket_rank, head_rank = divmod(index, self.heads)
        return head_rank * self.buckets + bucket_rank


def make_mesh(runtime: Runtime, heads: int, buckets: int, *, overlaps: bool = True) -> SequenceMesh:
    """Creates the process groups. Every rank must call it; `heads * buckets` must divide the world size."""
    size = heads * buckets
    dp_rank, rank_in_sequence = divmod(runtime.rank, size)
    head_rank, bucket_rank = divmod(rank_in_sequence, buckets)
    stats = CommStats()
    groups: dict[str, CommGroup] = {}

    def add_group(axis: str, ranks: list[int]) -> None:
        # new_group is collective over the world, also for groups that this rank is not in
        group = dist.new_group(ranks) if len(ranks) > 1 else None
        if runtime.rank in ranks:
            groups[axis] = CommGroup(group, len(ranks), ranks.index(runtime.rank), stats, overlaps=overlaps)

    for first in range(0, runtime.world_size, size):
        add_group("sequence", list(range(first, first + size)))
        for b in range(buckets):
            add_group("heads", [first + h * buckets + b for h in range(heads)])
        for h in range(heads):
            add_group("buckets", [first + h * buckets + b for b in range(buckets)])
    return SequenceMesh(
        heads=heads,
        buckets=buckets,
        dp_rank=dp_rank,
        dp_size=runtime.world_size // size,
        head_rank=head_rank,
        bucket_rank=bucket_rank,
        head_group=groups["heads"],
        bucket_group=groups["buckets"],
        sequence_group=groups["sequence"],
        stats=stats,
    )
