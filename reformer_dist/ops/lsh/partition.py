"""Who attends which part of the order: P ranks each own a *run* of consecutive tiles of every round.

The order of a round is that of all tokens by (bucket, position), whoever holds them. Its tiles are cut into P
runs of equal length, so work is balanced whatever the data, and a rank's tiles are tiles of the whole order:
sums run as on one rank. One rank is the case P = 1, whose run is everything.

Sizes are those of one round: U (batch, head) units, K buckets, S tokens at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.lsh.options import ChunkRule, Rule, WindowRule


@dataclass(frozen=True)
class Tiling:
    """Sizes that depend on the rule and the shape only, never on the data."""

    tile_len: int
    back: int
    """How many tiles before its own a query may look at."""
    front: int
    """How many behind its own."""


def choose_tiling(rule: Rule, seq_len: int, n_buckets: int) -> Tiling:
    """Tile sizes for a rule. Short buckets take short tiles, since a bucket's last tile is half empty."""
    if isinstance(rule, ChunkRule):
        return Tiling(rule.chunk_len, rule.n_before, rule.n_after)
    members = max(1, seq_len // n_buckets)
    tile_len = 16
    while tile_len < 64 and 4 * tile_len <= min(members, rule.window):
        tile_len *= 2
    reach = -(-(rule.window - 1) // tile_len)
    return Tiling(tile_len, reach, 0 if rule.causal else reach)


@dataclass(frozen=True)
class Partition:
    """One of `size` ranks that share the order."""

    index: int = 0
    size: int = 1

    def bounds(self, n_tiles: Tensor) -> tuple[Tensor, Tensor]:
        """First tile of this rank's run and the one behind its last."""
        return self.index * n_tiles // self.size, (self.index + 1) * n_tiles // self.size


@dataclass(frozen=True)
class WindowPartition:
    """What a rank holds of each bucket under the window rule: ranks in the bucket, each [U, K] int64.

    Queries are the members from `query_start` to before `query_stop`; what they may see lies from `start` to
    before `stop`. All four are 0 for a bucket of which the rank owns nothing.
    """

    start: Tensor
    stop: Tensor
    query_start: Tensor
    query_stop: Tensor
    total: Tensor
    """Members of the bucket on all ranks."""


def window_partition(total: Tensor, rule: WindowRule, tile_len: int, part: Partition) -> WindowPartition:
    """The run of a rank, from the size [U, K] of each bucket over all ranks."""
    total = total.long()
    if part.size == 1:
        nothing = torch.zeros_like(total)
        return WindowPartition(nothing, total, nothing, total, total)
    first_tile, tiles = _tiles(total, tile_len)
    run_start, run_stop = part.bounds(tiles.sum(dim=1, keepdim=True))
    first, last = (torch.minimum((edge - first_tile).clamp_min(0), tiles) for edge in (run_start, run_stop))
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


def _tiles(total: Tensor, tile_len: int) -> tuple[Tensor, Tensor]:
    """First tile and number of tiles of each bucket, [U, K]."""
    tiles = (total + tile_len - 1) // tile_len
    return tiles.cumsum(dim=1) - tiles, tiles


@dataclass(frozen=True)
class ChunkPartition:
    """What a rank holds of every round and unit under the chunk rule: numbers of chunks."""

    start: int
    stop: int
    """The chunks whose queries it attends: start to before stop."""
    needed: list[int]
    """All chunks of a round of which it needs the keys, ascending, its own included."""
    n_chunks: int
    """Of the whole order."""


def chunk_partition(seq_len: int, rule: ChunkRule, part: Partition) -> ChunkPartition:
    """The run of a rank in an order of `seq_len` tokens; the same in every round and unit."""
    n_chunks = rule.n_chunks(seq_len)
    start, stop = part.index * n_chunks // part.size, (part.index + 1) * n_chunks // part.size
    needed = set(range(start, stop))
    if stop > start:
        in_sight = range(start - rule.n_before, stop + rule.n_after)
        needed.update(c % n_chunks for c in in_sight if rule.wrap or 0 <= c < n_chunks)
    return ChunkPartition(start, stop, sorted(needed), n_chunks)


@dataclass(frozen=True)
class Recipients:
    """Which ranks take a token: those from `first` to `last`, where they own anything; [U, S] int64 each."""

    first: Tensor
    last: Tensor
    n_tiles: Tensor
    """[U, 1] tiles of the whole order."""

    def pairs(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(rank [U, S], whether that rank takes the token [U, S]) until every taker has been named."""
        width = int((self.last - self.first).max().item()) + 1 if self.first.numel() else 0
        for offset in range(width):
            rank = self.first + offset
            owns = (rank + 1) * self.n_tiles // size > rank * self.n_tiles // size
            yield rank, (rank <= self.last) & owns


def _owner(tile: Tensor, n_tiles: Tensor, size: int) -> Tensor:
    """The rank whose run holds the tile: the inverse of Partition.bounds.

    Of a tile behind the last, which only counts that are not of these tokens can name, it is the last rank: the
    exchange finds out, on all ranks alike.
    """
    return (((tile + 1) * size - 1) // n_tiles.clamp_min(1)).clamp_max(size - 1)


def window_recipients(
    bucket: Tensor, rank: Tensor, total: Tensor, rule: WindowRule, tile_len: int, size: int
) -> tuple[Tensor, list[Recipients]]:
    """The rank that attends each token as a query, [U, S], and those that need it at all.

    bucket [U, S] (K for padding, which nobody takes), rank in its bucket over all ranks [U, S], total [U, K].
    """
    total = total.long()
    first_tile, tiles = _tiles(total, tile_len)
    n_tiles = tiles.sum(dim=1, keepdim=True)
    is_real = bucket < total.shape[1]
    own = bucket.long().clamp_max(total.shape[1] - 1)
    base, members = first_tile.gather(1, own), total.gather(1, own)
    reach = rule.window - 1
    seen_last = torch.minimum(rank + reach, members - 1)
    seen_first = rank if rule.causal else (rank - reach).clamp_min(0)
    owner, first, last = (
        _owner(base + place // tile_len, n_tiles, size) for place in (rank, seen_first, seen_last)
    )
    nobody = torch.full_like(owner, -1)
    first, last = torch.where(is_real, first, 0), torch.where(is_real, last, -1)
    return torch.where(is_real, owner, nobody), [Recipients(first, last, n_tiles)]


def chunk_recipients(
    bucket: Tensor, rank: Tensor, total: Tensor, rule: ChunkRule, seq_len: int, size: int
) -> tuple[Tensor, list[Recipients]]:
    """As `window_recipients`, for chunks of an order of seq_len tokens."""
    total = total.long()
    is_real = bucket < total.shape[1]
    own = bucket.long().clamp_max(total.shape[1] - 1)
    chunk = ((total.cumsum(dim=1) - total).gather(1, own) + rank) // rule.chunk_len
    n_chunks = rule.n_chunks(seq_len)
    n_tiles = torch.full_like(total[:, :1], n_chunks)

    def readers(first_chunk: Tensor, last_chunk: Tensor) -> Recipients:
        is_some = is_real & (first_chunk <= last_chunk)
        first, last = (_owner(c, n_tiles, size) for c in (first_chunk, last_chunk))
        return Recipients(torch.where(is_some, first, 0), torch.where(is_some, last, -1), n_tiles)

    end = torch.full_like(chunk, n_chunks - 1)
    first, last = chunk - rule.n_after, chunk + rule.n_before
    found = [readers(first.clamp_min(0), torch.minimum(last, end))]
    if rule.wrap:
        found.append(readers(torch.zeros_like(chunk), torch.minimum(last - n_chunks, end)))
        found.append(readers((first + n_chunks).clamp_min(0), end))
    owner = _owner(chunk, n_tiles, size)
    return torch.where(is_real, owner, -torch.ones_like(owner)), found
