"""Partition of the sorted order: each of P ranks owns a contiguous range of the tiles of every round.

The order of a round is that of all tokens by (bucket, position), whichever rank holds them. Its tiles are split
into P ranges of equal length, so the work is balanced for any data. A rank's tiles are tiles of the full order, so
sums run as on one rank. A single rank is the case P = 1, whose range is everything.

Shapes are those of one round: BH (batch row, head) pairs, K buckets, S local tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.lsh.neighbour_rules import ChunkRule, Rule, WindowRule


@dataclass(frozen=True)
class Tiling:
    """Tile sizes. They depend on the rule and the shape only, never on the data."""

    tile_len: int
    n_before: int
    """Tiles before its own that a query may attend to."""
    n_after: int
    """Tiles after its own."""


def choose_tiling(rule: Rule, seq_len: int, n_buckets: int) -> Tiling:
    """Tile sizes for a rule. Small buckets get short tiles, since the last tile of a bucket is half empty."""
    if isinstance(rule, ChunkRule):
        return Tiling(rule.chunk_len, rule.n_before, rule.n_after)
    mean_size = max(1, seq_len // n_buckets)
    tile_len = 16
    while tile_len < 64 and 4 * tile_len <= min(mean_size, rule.window):
        tile_len *= 2
    reach = -(-(rule.window - 1) // tile_len)
    return Tiling(tile_len, reach, 0 if rule.causal else reach)


@dataclass(frozen=True)
class Partition:
    """One of the `size` ranks that share the order."""

    index: int = 0
    size: int = 1

    def bounds(self, n_tiles: Tensor) -> tuple[Tensor, Tensor]:
        """First tile of this rank's range, and one past the last."""
        return self.index * n_tiles // self.size, (self.index + 1) * n_tiles // self.size


@dataclass(frozen=True)
class WindowPartition:
    """Members of each bucket that a rank holds under the window rule: indices within the bucket, [BH, K] int64.

    Queries are the members in [query_start, query_stop), their keys those in [start, stop). All four bounds are 0
    for a bucket of which the rank owns nothing.
    """

    start: Tensor
    stop: Tensor
    query_start: Tensor
    query_stop: Tensor
    total: Tensor
    """Size of the bucket over all ranks."""


def window_partition(total: Tensor, rule: WindowRule, tile_len: int, partition: Partition) -> WindowPartition:
    """A rank's part of each bucket, from the bucket sizes [BH, K] over all ranks."""
    total = total.long()
    if partition.size == 1:
        zeros = torch.zeros_like(total)
        return WindowPartition(zeros, total, zeros, total, total)
    first_tile, n_tiles = _bucket_tiles(total, tile_len)
    range_bounds = partition.bounds(n_tiles.sum(dim=1, keepdim=True))
    first, last = (torch.minimum((bound - first_tile).clamp_min(0), n_tiles) for bound in range_bounds)
    query_start, query_stop = first * tile_len, torch.minimum(last * tile_len, total)
    reach = rule.window - 1
    stop = query_stop if rule.causal else torch.minimum(query_stop + reach, total)
    is_owner = last > first
    return WindowPartition(
        start=(query_start - reach).clamp_min(0) * is_owner,
        stop=stop * is_owner,
        query_start=query_start * is_owner,
        query_stop=query_stop * is_owner,
        total=total,
    )


def _bucket_tiles(total: Tensor, tile_len: int) -> tuple[Tensor, Tensor]:
    """First tile and number of tiles of each bucket, [BH, K]."""
    n_tiles = (total + tile_len - 1) // tile_len
    return n_tiles.cumsum(dim=1) - n_tiles, n_tiles


@dataclass(frozen=True)
class ChunkPartition:
    """The chunks that a rank holds under the chunk rule, of every round and head."""

    start: int
    stop: int
    """Chunks whose queries it attends: [start, stop)."""
    needed: list[int]
    """Chunks of a round whose keys it needs, ascending, including its own."""
    n_chunks: int
    """Chunks of the full order."""


def chunk_partition(seq_len: int, rule: ChunkRule, partition: Partition) -> ChunkPartition:
    """A rank's chunks of an order of `seq_len` tokens; the same for every round and head."""
    n_chunks = rule.n_chunks(seq_len)
    start = partition.index * n_chunks // partition.size
    stop = (partition.index + 1) * n_chunks // partition.size
    needed = set(range(start, stop))
    if stop > start:
        in_reach = range(start - rule.n_before, stop + rule.n_after)
        needed.update(c % n_chunks for c in in_reach if rule.wrap or 0 <= c < n_chunks)
    return ChunkPartition(start, stop, sorted(needed), n_chunks)


@dataclass(frozen=True)
class Recipients:
    """The ranks that need a token: those from `first` to `last` that own any tile; [BH, S] int64 each."""

    first: Tensor
    last: Tensor
    n_tiles: Tensor
    """[BH, 1] tiles of the full order."""

    def iter_ranks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (rank [BH, S], whether that rank needs the token [BH, S]) until every recipient is covered."""
        width = int((self.last - self.first).max().item()) + 1 if self.first.numel() else 0
        for offset in range(width):
            rank = self.first + offset
            owns_any = (rank + 1) * self.n_tiles // size > rank * self.n_tiles // size
            yield rank, (rank <= self.last) & owns_any


def _owner(tile: Tensor, n_tiles: Tensor, size: int) -> Tensor:
    """The rank whose range holds the tile: the inverse of Partition.bounds.

    The last rank for a tile past the end, which only counts that do not match the tokens can produce. The exchange
    detects that on all ranks.
    """
    return (((tile + 1) * size - 1) // n_tiles.clamp_min(1)).clamp_max(size - 1)


def window_recipients(
    bucket: Tensor, index: Tensor, total: Tensor, rule: WindowRule, tile_len: int, size: int
) -> tuple[Tensor, list[Recipients]]:
    """The rank that attends each token as a query, [BH, S] (-1 for padding), and the ranks that need it at all.

    bucket [BH, S] (K for padding, which no rank needs), index within the full bucket [BH, S], total [BH, K]:
    bucket sizes over all ranks.
    """
    total = total.long()
    first_tile, tiles = _bucket_tiles(total, tile_len)
    n_tiles = tiles.sum(dim=1, keepdim=True)
    is_real = bucket < total.shape[1]
    real_bucket = bucket.long().clamp_max(total.shape[1] - 1)
    base, bucket_size = first_tile.gather(1, real_bucket), total.gather(1, real_bucket)
    reach = rule.window - 1
    last_query = torch.minimum(index + reach, bucket_size - 1)
    first_query = index if rule.causal else (index - reach).clamp_min(0)
    owner, first, last = (_owner(base + r // tile_len, n_tiles, size) for r in (index, first_query, last_query))
    first, last = torch.where(is_real, first, 0), torch.where(is_real, last, -1)
    return torch.where(is_real, owner, torch.full_like(owner, -1)), [Recipients(first, last, n_tiles)]


def query_owners(
    bucket: Tensor, last_key: Tensor, total: Tensor, rule: WindowRule, tile_len: int, size: int
) -> Tensor:
    """The rank that attends each query with keys of their own, [BH, S]; -1 for padding and queries without keys.

    bucket [BH, S] of the queries, last_key [BH, S] (`sorting.last_key_ranks`), total [BH, K]: sizes of the buckets
    of keys over all ranks. A query belongs to the tile of its last key.
    """
    first_tile, tiles = _bucket_tiles(total.long(), tile_len)
    real_bucket = bucket.long().clamp_max(total.shape[1] - 1)
    has_keys = last_key >= 0 if rule.causal else total.gather(1, real_bucket) > 0
    tile = first_tile.gather(1, real_bucket) + last_key.clamp_min(0) // tile_len
    owner = _owner(tile, tiles.sum(dim=1, keepdim=True), size)
    return torch.where((bucket < total.shape[1]) & has_keys, owner, torch.full_like(owner, -1))


def chunk_recipients(
    bucket: Tensor, index: Tensor, total: Tensor, rule: ChunkRule, seq_len: int, size: int
) -> tuple[Tensor, list[Recipients]]:
    """As `window_recipients`, for chunks of an order of seq_len tokens."""
    total = total.long()
    is_real = bucket < total.shape[1]
    real_bucket = bucket.long().clamp_max(total.shape[1] - 1)
    chunk = ((total.cumsum(dim=1) - total).gather(1, real_bucket) + index) // rule.chunk_len
    n_chunks = rule.n_chunks(seq_len)
    n_tiles = torch.full_like(total[:, :1], n_chunks)

    def owners_of(first_chunk: Tensor, last_chunk: Tensor) -> Recipients:
        has_any = is_real & (first_chunk <= last_chunk)
        first, last = (_owner(c, n_tiles, size) for c in (first_chunk, last_chunk))
        return Recipients(torch.where(has_any, first, 0), torch.where(has_any, last, -1), n_tiles)

    end = torch.full_like(chunk, n_chunks - 1)
    first, last = chunk - rule.n_after, chunk + rule.n_before
    recipients = [owners_of(first.clamp_min(0), torch.minimum(last, end))]
    if rule.wrap:
        recipients.append(owners_of(torch.zeros_like(chunk), torch.minimum(last - n_chunks, end)))
        recipients.append(owners_of((first + n_chunks).clamp_min(0), end))
    owner = _owner(chunk, n_tiles, size)
    return torch.where(is_real, owner, -torch.ones_like(owner)), recipients
