"""The order of every round, cut into tiles, in tensors whose sizes are known beforehand: the host never waits.

A tile is up to `block` consecutive rows of one bucket's order (window rule), counted from its first member, or of
a unit's order (chunk rule). The table has as many as the shape allows; those that the data leaves over are empty,
and their programs end at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.lsh.attention import Shard
from reformer_dist.ops.lsh.hashing import bucket_dtype
from reformer_dist.ops.lsh.options import AttentionOptions, ChunkRule, Rule, WindowRule
from reformer_dist.ops.lsh.triton_kernels.tile_table import cut


@dataclass(frozen=True)
class KernelConstants:
    """What a kernel is compiled for."""

    block: int
    """Rows of a tile."""
    other_block: int
    """Rows that a tile's are compared with at a time, beside each other: fewer, which saves registers."""
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
    """Keys are q / |q|."""
    held: bool
    """Rows are those that a part holds (`Shard`), as one unit."""

    @staticmethod
    def of(
        options: AttentionOptions,
        block: int,
        other_block: int,
        head_dim: int,
        n_rounds: int,
        *,
        shared: bool,
        held: bool,
    ) -> KernelConstants:
        rule = options.rule
        chunked = isinstance(rule, ChunkRule)
        return KernelConstants(
            block=block,
            other_block=other_block,
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
            held=held,
        )


@dataclass(frozen=True)
class Tiles:
    """All rounds of BH units of S rows."""

    block: int
    order: Tensor
    """int32 [BH, R, S] row at each place."""
    table: Tensor
    """int32 [BH, R, tiles, 4]: first place; where its bucket begins; where its keys end; where it ends.

    Of held rows [.., 6]: where its queries begin, and end.
    """
    codes: Tensor | None
    """int32 [BH, R, S]: with count_pairs_once, code of each row's place (`order.position_codes`)."""
    who: Tensor | None = None
    """With dropout, int32 [BH] numbers of the units in their step.

    Of held rows, which are one unit, [2, S]: position, and number of the unit in its step.
    """
    here: Tensor | None = None
    """uint8 [R, S] of held rows: 0 in rounds from which they are absent. Then they are in no tile."""

    @property
    def are_held(self) -> bool:
        """Of held rows, and not of whole units."""
        return self.here is not None


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


def tile_heads(
    buckets: Tensor, numbers: Tensor | None, options: AttentionOptions, *, largest: int, has_padding: bool
) -> Tiles:
    """Tiles of bucket ids [BH, R, S], in which n_buckets marks padding: tiles of queries that meet nobody.

    numbers: see `Tiles.who`.
    """
    n_buckets = options.n_buckets
    block = block_of(options.rule, buckets.shape[2], n_buckets, largest)
    order, table, in_order = _cut_rounds(buckets, n_buckets, options.rule, block, has_padding=has_padding)
    return Tiles(block, order, table, _codes(order, in_order, options), numbers)


def tile_partition(shard: Shard, options: AttentionOptions, *, largest: int) -> Tiles:
    """Tiles of a partition as one unit, whose buckets are those of every unit."""
    assert isinstance(options.rule, WindowRule) and shard.positions is not None
    bounds = shard.query_bounds(options.rule)
    block = block_of(options.rule, shard.seq_len, options.n_buckets, largest)
    n_keys = shard.n_sort_keys
    order, table, _ = _cut_rounds(shard.sort_keys, n_keys, options.rule, block, has_padding=False, bounds=bounds)
    who = torch.stack([shard.positions, shard.head_index]).int()
    return Tiles(block, order, table, shard.position_codes, who, (shard.sort_keys[0] < n_keys).to(torch.uint8))


def _cut_rounds(
    buckets: Tensor, n_buckets: int, rule: Rule, block: int, *, has_padding: bool, bounds: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Order, table and sorted ids of bucket ids [BH, R, S]."""
    n_units, n_rounds, seq_len = buckets.shape
    buckets = buckets.to(bucket_dtype(n_buckets))
    in_order, places = buckets, None
    if n_buckets > 1 or has_padding or bounds is not None:
        # a radix sort of as few passes as the small type has bytes
        in_order, places = torch.sort(buckets, dim=2, stable=True)
    # under the chunk rule a unit is one bucket
    n_segments = (1 if isinstance(rule, ChunkRule) else n_buckets) + has_padding
    order = torch.empty(buckets.shape, dtype=torch.int32, device=buckets.device)
    sizes = (n_units, n_rounds, seq_len // block + n_segments, 4 if bounds is None else 6)
    table = torch.zeros(sizes, dtype=torch.int32, device=buckets.device)
    cut(in_order, places, bounds, order, table, n_buckets, block, chunked=isinstance(rule, ChunkRule))
    return order, table, in_order


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
