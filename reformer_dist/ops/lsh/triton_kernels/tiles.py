"""Sorted order and tiles of every round, in tensors of sizes that do not depend on the data: the host never waits.

A tile is up to `block` consecutive rows of the sorted order: of one bucket, counted from its first member (window
rule), or of a whole head (chunk rule). The table has an entry for every tile that the shape allows. Entries that
the data leaves unused are empty, and their programs return at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.lsh.attention import Shard
from reformer_dist.ops.lsh.hashing import bucket_dtype
from reformer_dist.ops.lsh.neighbour_rules import ChunkRule, Rule, WindowRule
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.triton_kernels.tile_table import build_table
from reformer_dist.ops.lsh.triton_kernels.tuning import Split, Tuning


@dataclass(frozen=True)
class KernelConstants:
    """Compile-time constants of the attention kernels."""

    block: int
    """Rows of a tile."""
    other_block: int
    """Rows of a block beside the tile: fewer, which saves registers."""
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
    """A round is padded to a multiple of this."""
    causal: bool
    sees_self: bool
    counts_once: bool
    drops: bool
    documents: bool
    """Rows of different documents do not attend to each other."""
    shared: bool
    """Keys are q / |q|."""
    bounded: bool
    """Tables have bounds of the queries: 6 columns."""
    sharded: bool
    """Rows are a partition of the sorted order (`attention.Shard`), as one head."""
    attends_alone: bool
    """A query of a whole sequence that meets no key attends to itself, else it gets 0."""
    is_first: bool
    """Tiles are the first ones of their buckets: no row is before them."""
    listed: bool
    """Tiles are a list, `Tiles.tail`, which the programs of a line go through in turns."""
    by_rank: bool
    """Which rows beside each other attend depends on their ranks in the bucket alone, see `pair_mask.attends`."""

    @staticmethod
    def of(
        options: AttentionOptions,
        block: int,
        other_block: int,
        head_dim: int,
        n_rounds: int,
        *,
        shared: bool,
        sharded: bool,
        is_first: bool = False,
        listed: bool = False,
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
            sees_self=rule.sees_self or options.own_keys,  # own keys: see the last keys of Side.planes
            counts_once=options.count_pairs_once and n_rounds > 1,
            drops=options.dropout > 0,
            documents=options.document_ids is not None,
            shared=shared,
            bounded=sharded and not options.own_keys,
            sharded=sharded,
            attends_alone=options.attends_alone and not sharded,
            is_first=is_first,
            listed=listed,
            by_rank=rule.causal and not (chunked or sharded or options.own_keys),
        )


@dataclass(frozen=True)
class Tiles:
    """All rounds of BH heads of S rows each."""

    block: int
    order: Tensor
    """int32 [BH, R, S] row at each slot."""
    table: Tensor
    """int32 [BH, R, entries, 4]: first slot of the tile; of its bucket first slot, end of keys, end of rows.

    Of a partition [.., 6]: also first slot and end of its queries.
    """
    codes: Tensor | None
    """int32 [BH, R, S]: with count_pairs_once, position codes of the rows (`sorting.position_codes`)."""
    token_ids: Tensor | None = None
    """With dropout, int32 [BH] indices of the (batch row, head) pairs in their step.

    Of a partition, which is one head, [2, S]: position of each row, and index of its (batch row, head).
    """
    document_ids: Tensor | None = None
    """int32 [BH, S]: see `attention.Shard`."""
    n_first: int | None = None
    """Entries of the first tiles of buckets, one per bucket. The other tiles, those of `tuning.Split.tail`, are in
    a list after them, whose length is the first number of the entry between. None: all tiles are alike."""
    present: Tensor | None = None
    """Of a partition, uint8 [R, S]: 0 in rounds from which a row is absent. There it is in no tile."""

    @property
    def is_partition(self) -> bool:
        """Of a partition of the sorted order instead of whole heads."""
        return self.present is not None


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


def tile_heads(shard: Shard, options: AttentionOptions, of_width: Tuning) -> Tiles:
    """Tiles of whole sequences. Those of padding are of queries without keys."""
    buckets, n_buckets, padded = shard.sort_keys, options.n_buckets, shard.has_padding
    block = block_of(options.rule, buckets.shape[2], n_buckets, of_width.block)
    split = of_width.split
    if split is not None and split.fits(options.rule, shard.seq_len, n_buckets):
        block = split.first.block
    else:
        split = None
    order, table, sorted_ids = _sort_rounds(
        buckets, n_buckets, options.rule, block, has_padding=padded, split=split
    )
    token_ids = None if shard.head_index is None else shard.head_index.int()
    codes = _position_codes(order, sorted_ids, options)
    n_first = None if split is None else n_buckets + padded
    return Tiles(block, order, table, codes, token_ids, _contiguous(shard.document_ids), n_first)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def tile_partition(shard: Shard, options: AttentionOptions, of_width: Tuning) -> Tiles:
    """Tiles of a partition as one head, whose buckets are those of every head."""
    assert isinstance(options.rule, WindowRule) and shard.positions is not None and shard.head_index is not None
    bounds, n_keys = shard.query_bounds(options.rule), shard.n_sort_keys
    block = block_of(options.rule, shard.seq_len, options.n_buckets, of_width.block)
    order, table, _ = _sort_rounds(shard.sort_keys, n_keys, options.rule, block, has_padding=False, bounds=bounds)
    token_ids = torch.stack([shard.positions, shard.head_index]).int()
    is_present = (shard.sort_keys[0] < n_keys).to(torch.uint8)
    documents = _contiguous(shard.document_ids)
    return Tiles(block, order, table, shard.position_codes, token_ids, documents, present=is_present)


def _sort_rounds(
    buckets: Tensor,
    n_buckets: int,
    rule: Rule,
    block: int,
    *,
    has_padding: bool,
    bounds: Tensor | None = None,
    split: Split | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Order, table and sorted ids of bucket ids [BH, R, S]."""
    n_heads, n_rounds, seq_len = buckets.shape
    buckets = buckets.to(bucket_dtype(n_buckets))
    sorted_ids, rows = buckets, None
    if n_buckets > 1 or has_padding or bounds is not None:
        # a radix sort takes one pass per byte of the type
        sorted_ids, rows = torch.sort(buckets, dim=2, stable=True)
    # under the chunk rule a head is one bucket
    n_segments = (1 if isinstance(rule, ChunkRule) else n_buckets) + has_padding
    order = torch.empty(buckets.shape, dtype=torch.int32, device=buckets.device)
    n_entries, splitting = seq_len // block + n_segments, {}
    if split is not None:
        n_entries = n_segments + 1 + seq_len // split.tail.block
        splitting = {"n_first": n_segments, "tail_block": split.tail.block}
    sizes = (n_heads, n_rounds, n_entries, 4 if bounds is None else 6)
    table = torch.zeros(sizes, dtype=torch.int32, device=buckets.device)
    chunked = isinstance(rule, ChunkRule)
    build_table(sorted_ids, rows, bounds, order, table, n_buckets, block, chunked=chunked, **splitting)
    return order, table, sorted_ids


@dataclass(frozen=True)
class Side:
    """All rounds of BH heads of S rows, as queries or as keys, where keys have buckets of their own."""

    planes: Tensor
    """int32 [3 or 4, BH, R, S]: of each slot its row, the first slot on the other side in its reach, and one past
    the last; of queries also the slot of the last key up to it."""
    table: Tensor
    """See `Tiles.table`."""
    codes: Tensor | None
    """See `Tiles.codes`."""


@dataclass(frozen=True)
class OwnKeyTiles:
    """As `Tiles`, where keys have buckets of their own."""

    block: int
    queries: Side
    keys: Side
    token_ids: Tensor | None
    document_ids: Tensor | None
    is_partition: bool


def tile_own_keys(shard: Shard, options: AttentionOptions, of_width: Tuning) -> OwnKeyTiles:
    """Tiles of whole sequences or of a partition. Those of absent rows reach nothing."""
    rule, n_ids = options.rule, shard.n_sort_keys
    assert isinstance(rule, WindowRule) and shard.query_sort_keys is not None
    block, padded = (
        block_of(rule, shard.seq_len, options.n_buckets, of_width.block),
        shard.has_padding or not shard.is_whole,
    )
    (key_order, key_table, key_ids), (query_order, query_table, query_ids) = (
        _sort_rounds(x, n_ids, rule, block, has_padding=padded) for x in (shard.sort_keys, shard.query_sort_keys)
    )
    key_ids, query_ids, size = key_ids.int(), query_ids.int(), key_order.shape[2]
    behind = min(rule.window, size) - 1
    ahead = 0 if rule.causal else behind

    def places(ids: Tensor, order: Tensor) -> Tensor:  # ascending; rows of a head are ordered by position
        return ids.long() * size + order

    last_key = _find(places(key_ids, key_order), places(query_ids, query_order), right=rule.sees_self) - 1
    slot = torch.arange(size, dtype=torch.int32, device=last_key.device).expand_as(last_key)
    begin = torch.maximum(last_key - behind, _find(key_ids, query_ids))
    end = torch.minimum(last_key + 1 + ahead, _find(key_ids, query_ids, right=True))
    # last_key ascends over the whole order
    first_query = torch.maximum(_find(last_key, slot - ahead), _find(query_ids, key_ids))
    query_end = torch.minimum(_find(last_key, slot + behind, right=True), _find(query_ids, key_ids, right=True))
    begin, end = (x * (query_ids < n_ids) for x in (begin, end))
    first_query, query_end = (x * (key_ids < n_ids) for x in (first_query, query_end))
    codes, query_codes = shard.position_codes, shard.query_codes
    if shard.is_whole:
        codes = _position_codes(key_order, key_ids, options)
        query_codes = None if codes is None else _code_rows(query_order, last_key, query_ids, rule)
    token_ids = None
    if options.dropout > 0:
        assert shard.head_index is not None
        token_ids = shard.head_index.int()
        if shard.positions is not None:
            token_ids = torch.stack([shard.positions.int(), token_ids])
    return OwnKeyTiles(
        block,
        Side(torch.stack([query_order, begin, end, last_key]), query_table, query_codes),
        Side(torch.stack([key_order, first_query, query_end]), key_table, codes),
        token_ids,
        _contiguous(shard.document_ids),
        not shard.is_whole,
    )


def _find(ascending: Tensor, values: Tensor, *, right: bool = False) -> Tensor:
    """int32: number of elements below each value, or up to it if right, along the last dimension."""
    return torch.searchsorted(ascending, values.contiguous(), out_int32=True, right=right)


def _code_rows(order: Tensor, slots: Tensor, sorted_ids: Tensor, rule: WindowRule) -> Tensor:
    """Position codes [BH, R, S] of rows at slots of the sorted order of their buckets, a window apart."""
    codes = slots + sorted_ids * rule.window
    return torch.empty_like(order).scatter_(2, order.long(), codes)


def _position_codes(order: Tensor, sorted_ids: Tensor, options: AttentionOptions) -> Tensor | None:
    if not options.count_pairs_once or order.shape[1] == 1:
        return None
    rule = options.rule
    slot = torch.arange(order.shape[2], dtype=torch.int32, device=order.device)
    if isinstance(rule, WindowRule):
        return _code_rows(order, slot, sorted_ids.to(torch.int32), rule)
    codes = (slot // rule.chunk_len).expand_as(order)
    return torch.empty_like(order).scatter_(2, order.long(), codes)
