"""The order of every round, cut into tiles, in tensors whose sizes are known beforehand: the host never waits.

A tile is up to `block` consecutive rows of one bucket's order (window rule), counted from its first member, or of
a unit's order (chunk rule). There are at most so many as the shape allows; those that the data leaves over are
empty, and their programs end at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.lsh.hashing import bucket_dtype
from reformer_dist.ops.lsh.rules import AttentionOptions, ChunkRule, Rule


@dataclass(frozen=True)
class Constants:
    """What a kernel is compiled for."""

    block: int
    """Queries, and keys, that a program handles at a time."""
    head_dim: int
    block_d: int
    """head_dim, rounded up to a power of 2."""
    precision: str
    n_rounds: int
    chunked: bool
    span: int
    """The window, or the length of a chunk."""
    before: int
    after: int
    wraps: bool
    round_to: int
    """The rows of a round count as padded to a multiple of this."""
    causal: bool
    sees_self: bool
    counts_once: bool
    drops: bool
    shared: bool
    """Backward: keys are q / |q|."""

    @staticmethod
    def of(options: AttentionOptions, block: int, head_dim: int, n_rounds: int, *, shared: bool) -> Constants:
        rule = options.rule
        chunked = isinstance(rule, ChunkRule)
        return Constants(
            block=block,
            head_dim=head_dim,
            block_d=max(16, 1 << (head_dim - 1).bit_length()),
            precision="ieee",
            n_rounds=n_rounds,
            chunked=chunked,
            span=rule.chunk_len if isinstance(rule, ChunkRule) else rule.window,
            before=rule.n_before if isinstance(rule, ChunkRule) else 0,
            after=rule.n_after if isinstance(rule, ChunkRule) else 0,
            wraps=isinstance(rule, ChunkRule) and rule.wrap,
            round_to=rule.round_to if isinstance(rule, ChunkRule) else 1,
            causal=rule.causal,
            sees_self=rule.sees_self,
            counts_once=options.count_pairs_once and n_rounds > 1,
            drops=options.dropout > 0,
            shared=shared,
        )


@dataclass(frozen=True)
class Tiles:
    """All rounds of U units of S rows."""

    block: int
    order: Tensor
    """int32 [U, R, S] row at each place."""
    table: Tensor
    """int32 [U, R, tiles, 5]: first place; keys from .. to before ..; queries from .. to before .."""
    codes: Tensor | None
    """int32 [U, R, S]: with count_pairs_once, code of each row's place (`order.place_codes`)."""


def largest_block(head_dim: int, dtype: torch.dtype) -> int:
    """The most rows of a tile whose products fit the registers of a program (docs/kernels.md)."""
    if dtype != torch.float32:
        return 64
    return 32 if head_dim <= 64 else 16


def block_of(rule: Rule, seq_len: int, n_buckets: int, largest: int) -> int:
    """Rows of a tile: a function of rule and shape only. Short buckets take short tiles."""
    if isinstance(rule, ChunkRule):
        reach, members = rule.chunk_len, seq_len
    else:
        reach, members = rule.window, max(1, seq_len // n_buckets)
    block = 16
    while block < largest and 2 * block <= min(members, reach):
        block *= 2
    return block


def tile_units(buckets: Tensor, options: AttentionOptions, *, largest: int, has_padding: bool) -> Tiles:
    """Tiles of bucket ids [U, R, S], in which n_buckets marks padding: tiles of queries that meet nobody."""
    seq_len, rule, n_buckets = buckets.shape[2], options.rule, options.n_buckets
    block = block_of(rule, seq_len, n_buckets, largest)
    buckets = buckets.to(bucket_dtype(n_buckets))
    in_order, places = _sorted(buckets, options, has_padding)
    # where each bucket stops, and the padding behind them; under the chunk rule a unit is one bucket
    first_edge = n_buckets if isinstance(rule, ChunkRule) else 1
    edges = torch.arange(first_edge, n_buckets + 1, device=buckets.device).to(buckets.dtype)
    edges = edges.expand(*buckets.shape[:2], -1).contiguous()
    stops = torch.searchsorted(in_order.contiguous(), edges, out_int32=True)
    stops = torch.nn.functional.pad(stops, (0, 1), value=seq_len)
    starts = torch.nn.functional.pad(stops[..., :-1], (1, 0))
    is_padding = torch.arange(stops.shape[2], device=buckets.device) == stops.shape[2] - 1
    key_stops = torch.where(is_padding, starts, stops)
    table = _cut(starts, starts, key_stops, starts, stops, block, seq_len)
    order = places.to(torch.int32).contiguous()
    return Tiles(block, order, table, _codes(order, in_order, options))


def _sorted(buckets: Tensor, options: AttentionOptions, has_padding: bool) -> tuple[Tensor, Tensor]:
    """Bucket ids in order, and the row at each place."""
    if options.n_buckets == 1 and not has_padding:
        return buckets, torch.arange(buckets.shape[2], device=buckets.device).expand_as(buckets)
    # a radix sort of as few passes as the small type has bytes
    return torch.sort(buckets, dim=2, stable=True)


def _cut(
    first: Tensor, key_start: Tensor, key_stop: Tensor, start: Tensor, stop: Tensor, block: int, n_rows: int
) -> Tensor:
    """The table of tiles of segments [U, R, segments], each from a first place to its last query or key."""
    n_segments = first.shape[2]
    n_tiles = (torch.maximum(stop, key_stop) - first + block - 1) // block
    until = n_tiles.cumsum(dim=2, dtype=torch.int32)
    bound = (n_rows + min(n_segments, n_rows) * (block - 1)) // block
    tile = torch.arange(bound, dtype=torch.int32, device=first.device).expand(*first.shape[:2], -1).contiguous()
    segment = torch.searchsorted(until, tile, right=True)
    is_tile = segment < n_segments
    segment = segment.clamp_max_(n_segments - 1)
    place = (first + (n_tiles - until) * block).gather(2, segment) + tile * block
    columns = [place, *(edge.gather(2, segment) for edge in (key_start, key_stop, start, stop))]
    return torch.stack(columns, dim=3).to(torch.int32).mul_(is_tile.unsqueeze(3))


def _codes(order: Tensor, in_order: Tensor, options: AttentionOptions) -> Tensor | None:
    if not options.count_pairs_once or order.shape[1] == 1:
        return None
    rule = options.rule
    place = torch.arange(order.shape[2], dtype=torch.int32, device=order.device)
    if isinstance(rule, ChunkRule):
        codes = (place // rule.chunk_len).expand_as(order)
    else:
        codes = place + in_order.to(torch.int32) * rule.window  # buckets lie a window apart
    return torch.empty_like(order).scatter_(2, order.long(), codes)
