"""One round's order by (bucket, position), laid out in tiles that attention can take as they are.

A *slot* is a place in the laid-out order; it holds a token or is empty (-1). A *tile* is `tile_len` slots.
The queries of a tile look at the slots from `back` before the tile to `front` behind it.

Window rule: every bucket starts on a tile border. So the column in which a query finds a key depends on their
ranks in the bucket alone, never on how full other buckets are, and sums run in the same order whatever the
future holds: strict causality to the last bit. Chunk rule: a tile is a chunk, and empty tiles (or the wrapped
ones) part the heads.

Tokens of several heads are laid out together: token t of head g is number g * seq_len + t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.lsh.rules import ChunkRule, Rule, WindowRule


@dataclass(frozen=True)
class Tiling:
    """Sizes that depend on the rule and the shape only, never on the data."""

    tile_len: int
    back: int
    front: int

    @property
    def columns(self) -> int:
        return self.back + self.tile_len + self.front


@dataclass(frozen=True)
class Layout:
    """One round of a group of heads."""

    tiling: Tiling
    query_slots: Tensor
    """[n_tiles * tile_len] token in each slot as a query, -1 if empty or (chunk rule) padding."""
    key_slots: Tensor
    """[back + n_tiles * tile_len + front] likewise, as a key."""
    home: Tensor
    """[n_heads * seq_len] slot of each token."""
    rank: Tensor | None
    """Window rule: [n_tiles] rank in its bucket of each tile's first slot."""
    count: Tensor | None
    """Window rule: [n_tiles] tokens of each tile's bucket (0 for padding, which nobody sees)."""

    @property
    def n_tiles(self) -> int:
        return self.query_slots.numel() // self.tiling.tile_len


def tiling_of(rule: Rule, seq_len: int, n_buckets: int) -> Tiling:
    """Tile sizes for a rule. Short buckets take short tiles, since a bucket's last tile is half empty."""
    if isinstance(rule, ChunkRule):
        return Tiling(rule.chunk_len, rule.n_before * rule.chunk_len, rule.n_after * rule.chunk_len)
    members = max(1, seq_len // n_buckets)
    tile_len = 16
    while tile_len < 64 and 4 * tile_len <= min(2 * members, 2 * rule.window):
        tile_len *= 2
    return Tiling(tile_len, rule.window, 0 if rule.causal else rule.window)


def build_layouts(bucket_ids: Tensor, rule: Rule, n_buckets: int, key_padding: Tensor | None) -> list[Layout]:
    """Layouts of all rounds of `bucket_ids` [heads, R, S]; key_padding [heads, S] is True for padding."""
    n_hashes = bucket_ids.shape[1]
    tiling = tiling_of(rule, bucket_ids.shape[2], n_buckets)
    keys = bucket_ids.long()
    if key_padding is not None:
        keys = torch.where(key_padding.unsqueeze(1), n_buckets, keys)
    if isinstance(rule, WindowRule):
        return [_window_layout(keys[:, r], n_buckets, tiling) for r in range(n_hashes)]
    return _chunk_layouts(keys, rule, n_buckets, tiling, key_padding)


def _sort(bucket: Tensor, n_buckets: int) -> tuple[Tensor, Tensor]:
    """Stable order of the tokens of all heads by (head, bucket, position), and the sorted (head, bucket)."""
    n_heads = bucket.shape[0]
    first = torch.arange(n_heads, device=bucket.device).unsqueeze(1) * (n_buckets + 1)
    sorted_keys, order = torch.sort((bucket + first).flatten(), stable=True)
    return order, sorted_keys


def _window_layout(bucket: Tensor, n_buckets: int, tiling: Tiling) -> Layout:
    n_heads = bucket.shape[0]
    order, sorted_keys = _sort(bucket, n_buckets)
    counts = torch.bincount(sorted_keys, minlength=n_heads * (n_buckets + 1))
    tiles = (counts + tiling.tile_len - 1) // tiling.tile_len
    first_tile, first_sorted = tiles.cumsum(0) - tiles, counts.cumsum(0) - counts

    place = torch.arange(order.numel(), device=order.device)
    slot = first_tile[sorted_keys] * tiling.tile_len + place - first_sorted[sorted_keys]
    bucket_of_tile = torch.repeat_interleave(tiles)
    n_slots = bucket_of_tile.numel() * tiling.tile_len

    query_slots = torch.full((n_slots,), -1, device=order.device)
    query_slots[slot] = order
    home = torch.empty_like(order)
    home[order] = slot
    nobody = torch.full((max(tiling.back, tiling.front),), -1, device=order.device)
    key_slots = torch.cat([nobody[: tiling.back], query_slots, nobody[: tiling.front]])
    rank = (
        torch.arange(bucket_of_tile.numel(), device=order.device) - first_tile[bucket_of_tile]
    ) * tiling.tile_len
    is_padding = bucket_of_tile % (n_buckets + 1) == n_buckets
    count = counts[bucket_of_tile].masked_fill(is_padding, 0)
    return Layout(tiling, query_slots, key_slots, home, rank, count)


def _chunk_layouts(
    bucket: Tensor, rule: ChunkRule, n_buckets: int, tiling: Tiling, key_padding: Tensor | None
) -> list[Layout]:
    n_heads, n_hashes, seq_len = bucket.shape
    n_chunks = -(-seq_len // rule.chunk_len)
    n_real = n_chunks * rule.chunk_len
    orders = [_sort(bucket[:, r], n_buckets)[0].view(n_heads, seq_len) for r in range(n_hashes)]
    nobody = torch.full((n_heads, n_real - seq_len), -1, device=bucket.device)
    chunks = torch.stack([torch.cat([order, nobody], dim=1) for order in orders], dim=1)
    visible = chunks
    if key_padding is not None:
        # a padded token has a slot, so that it has a home; but nobody sees it there and it sees nobody
        visible = chunks.masked_fill(key_padding.flatten()[chunks.clamp_min(0)], -1)
    return [_chunk_layout(chunks[:, r], visible, r, rule, tiling, seq_len) for r in range(n_hashes)]


def _chunk_layout(
    chunks: Tensor, visible: Tensor, round_: int, rule: ChunkRule, tiling: Tiling, seq_len: int
) -> Layout:
    """chunks [heads, slots]: this round's order, -1 where empty; visible [heads, R, slots]: less padding."""
    n_heads, n_hashes, n_slots = visible.shape
    before, after = tiling.back, tiling.front
    # a head's tiles: `n_before` that only lend keys, its chunks, `n_after` that only lend keys
    padded = chunks.new_full((2, n_heads, before + n_slots + after), -1)
    tokens, queries = padded[0], padded[1]
    tokens[:, before : before + n_slots] = chunks
    queries[:, before : before + n_slots] = visible[:, round_]
    keys = queries
    if rule.wrap:
        first = round_ * n_slots
        place = torch.arange(first - before, first + n_slots + after, device=chunks.device)
        keys = visible.reshape(n_heads, -1)[:, place % (n_hashes * n_slots)]
    nobody = chunks.new_full((max(before, after),), -1)
    key_slots = torch.cat([nobody[:before], keys.flatten(), nobody[:after]])
    is_taken = tokens.flatten() >= 0
    home = torch.empty(n_heads * seq_len, dtype=torch.int64, device=chunks.device)
    home[tokens.flatten()[is_taken]] = is_taken.nonzero().squeeze(1)
    return Layout(tiling, queries.flatten(), key_slots, home, None, None)
