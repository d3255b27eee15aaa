"""Attention to another sequence, bucket by bucket: tiles of queries against the tiles of keys of their bucket.

In every round the queries and the keys of each (batch row, head) are sorted by bucket and cut into tiles, each in
one bucket. Pairs of tiles of the same bucket are multiplied, many at a time. The softmax runs as in
`torch_tiles.rounds`: round after round into a running softmax, and backward from the total logsumexp.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reformer_dist.ops.dropout import keep_mask, token_keys
from reformer_dist.ops.first_order import FirstOrderFunction, first_order
from reformer_dist.ops.lsh.online_softmax import LOG2_E, LOG_2, LOWEST, PartialSoftmax
from reformer_dist.ops.lsh.options import CrossOptions
from reformer_dist.ops.lsh.sorting import mark_padding, radix_argsort

# Tokens of both sequences that are sorted together, and scores that exist at a time.
GROUP_TOKENS = {"cpu": 2**15, "cuda": 2**20}
CHUNK_SCORES = {"cpu": 2**18, "cuda": 2**24}


def tiled_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_ids: Tensor,
    key_ids: Tensor,
    options: CrossOptions,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """See `cross_attention`."""
    out: Tensor = _TiledCrossAttention.apply(q, k, v, query_ids, key_ids, options, key_padding_mask)
    return out


class _TiledCrossAttention(FirstOrderFunction):
    what = "LSH cross attention"
    way_out = "set model.attention_backend=reference or model.cross_attention=exact, and model.recompute=none"

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_ids: Tensor,
        key_ids: Tensor,
        options: CrossOptions,
        key_padding_mask: Tensor | None,
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        with torch.autocast(q.device.type, enabled=False):
            for group in _groups(query_ids, key_ids, options, key_padding_mask):
                rows = group.rows(q, k, v)
                total: PartialSoftmax | None = None
                for pairs in group.rounds:
                    partial = _attend_round(group, pairs, *rows)
                    total = partial if total is None else total.merge(partial)
                assert total is not None
                o, group_lse = total.output()
                o[torch.isinf(group_lse)] = 0
                group.queries(out).copy_(o)
                lse.view(-1)[group.query_rows] = group_lse
        ctx.save_for_backward(q, k, v, query_ids, key_ids, out, lse, key_padding_mask)
        ctx.options = options
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, query_ids, key_ids, out, lse, key_padding_mask = ctx.saved_tensors
        d_out = grads[0].contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        with torch.autocast(q.device.type, enabled=False):
            for group in _groups(query_ids, key_ids, ctx.options, key_padding_mask):
                do = group.queries(d_out).float()
                group_lse = lse.view(-1)[group.query_rows]
                delta = (do * group.queries(out).float()).sum(dim=1)
                rows = group.rows(q, k, v)
                totals = [torch.zeros_like(x) for x in rows]
                for pairs in group.rounds:
                    round_grads = _backward_round(group, pairs, *rows, do, group_lse, delta)
                    for total, grad in zip(totals, round_grads, strict=True):
                        total += grad
                group.queries(dq).copy_(totals[0].mul_(ctx.options.scale))
                group.keys(dk).copy_(totals[1].mul_(LOG_2))
                group.keys(dv).copy_(totals[2])
        return dq, dk, dv, None, None, None, None


@dataclass(frozen=True)
class _Tiles:
    """Rows [n_rows, ...] of one round, in tiles within one bucket each."""

    slots: Tensor
    """[n_tiles, tile_len] row in each slot, -1 if empty."""
    slot_of_row: Tensor
    """[n_rows] slot of each row; one past the last for rows in no bucket (padding)."""

    def gather(self, rows: Tensor) -> Tensor:
        """[n_tiles, tile_len, ...] from rows [n_rows, ...], with an arbitrary row in empty slots."""
        return rows[self.slots.clamp_min(0)]

    def to_rows(self, tiles: Tensor, fill: float = 0.0) -> Tensor:
        """[n_rows, ...] from tiles [n_tiles, tile_len, ...], `fill` for rows in no tile."""
        flat = tiles.flatten(0, 1)
        return torch.cat([flat, flat.new_full((1, *flat.shape[1:]), fill)])[self.slot_of_row]


@dataclass(frozen=True)
class _TilePairs:
    """The tiles of one round, and the pairs of them that share a bucket."""

    round_: int
    queries: _Tiles
    keys: _Tiles
    query_tile: Tensor
    """[n_pairs] ascending."""
    key_tile: Tensor
    """[n_pairs]"""
    borders: list[int]
    """Bounds of the chunks of pairs; all pairs of a query tile are in the same chunk."""

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yields for each chunk: its range of query tiles, each pair's index in it, query tiles, key tiles."""
        for start, stop in zip(self.borders, self.borders[1:], strict=False):
            query, key = self.query_tile[start:stop], self.key_tile[start:stop]
            first, last = int(query[0]), int(query[-1])
            yield slice(first, last + 1), query - first, query, key


@dataclass(frozen=True)
class _Group:
    """Consecutive (batch row, head) pairs."""

    options: CrossOptions
    query_rows: slice
    """Rows of the flat queries [B * H * S, D]."""
    key_rows: slice
    rounds: list[_TilePairs]
    query_ids: Tensor
    """[R, query rows of the group]"""
    key_ids: Tensor
    query_coords: tuple[Tensor, Tensor]
    """Head index (within the step) and position of each query row."""
    key_coords: tuple[Tensor, Tensor]

    def queries(self, x: Tensor) -> Tensor:
        return x.view(-1, x.shape[-1])[self.query_rows]

    def keys(self, x: Tensor) -> Tensor:
        return x.view(-1, x.shape[-1])[self.key_rows]

    def rows(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the group in float32, q scaled so that q.k is the score in units of log 2."""
        return self.queries(q).float() * (self.options.scale * LOG2_E), self.keys(k).float(), self.keys(v).float()

    def bias(self, pairs: _TilePairs, query: Tensor, key: Tensor) -> Tensor:
        """Bias of the scores, over log 2: [n_pairs, 1 or tile_len, tile_len]; -inf at empty key slots."""
        slots = pairs.keys.slots[key].unsqueeze(1)
        bias = torch.zeros(slots.shape, dtype=torch.float32, device=slots.device)
        bias.masked_fill_(slots < 0, -torch.inf)
        if not self.options.count_pairs_once or len(self.rounds) == 1:
            return bias
        query_rows, key_rows = pairs.queries.slots[query].clamp_min(0), slots.clamp_min(0)
        n_shared = sum(
            (query_bucket[query_rows].unsqueeze(2) == key_bucket[key_rows]).float()
            for query_bucket, key_bucket in zip(self.query_ids, self.key_ids, strict=True)
        )
        assert isinstance(n_shared, Tensor)
        return bias - n_shared.clamp_min_(1).log2_()

    def dropout_factors(self, pairs: _TilePairs, query: Tensor, key: Tensor) -> Tensor:
        """0 or 1 / (1 - dropout), [n_pairs, tile_len, tile_len]."""
        dropout, seed = self.options.dropout, self.options.dropout_seed
        query_keys = token_keys(*self.query_coords, pairs.round_, seed, is_query=True)
        key_keys = token_keys(*self.key_coords, pairs.round_, seed, is_query=False)
        keep = keep_mask(pairs.queries.gather(query_keys)[query], pairs.keys.gather(key_keys)[key], dropout)
        return keep.float().mul_(1 / (1 - dropout))


def _attend_round(group: _Group, pairs: _TilePairs, q: Tensor, k: Tensor, v: Tensor) -> PartialSoftmax:
    """The softmax state of each query row over the keys of its bucket; q in units of log 2."""
    queries, keys, values = pairs.queries.gather(q), pairs.keys.gather(k), pairs.keys.gather(v)
    o, row_max = torch.zeros_like(queries), queries.new_full(queries.shape[:2], LOWEST)
    row_sum = torch.zeros_like(row_max)
    for chunk, index, query, key in pairs.chunks():
        p = torch.baddbmm(group.bias(pairs, query, key), queries[query], keys[key].transpose(1, 2))
        largest = torch.segment_reduce(p.amax(dim=2), "max", lengths=index.bincount(), axis=0).clamp_min_(LOWEST)
        row_max[chunk] = largest
        p.sub_(largest[index].unsqueeze(2)).exp2_()
        row_sum[chunk].index_add_(0, index, p.sum(dim=2))
        if group.options.dropout > 0:
            p.mul_(group.dropout_factors(pairs, query, key))
        o[chunk].index_add_(0, index, torch.bmm(p, values[key]))
    to_rows = pairs.queries.to_rows
    return PartialSoftmax(to_rows(o), to_rows(row_max, LOWEST), to_rows(row_sum))


def _backward_round(
    group: _Group, pairs: _TilePairs, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One round's dq / scale, dk / log 2 and dv; q and lse in units of log 2, lse = inf excludes a row."""
    queries, d_outs = pairs.queries.gather(q), pairs.queries.gather(d_out)
    keys, values = pairs.keys.gather(k), pairs.keys.gather(v)
    lses = pairs.queries.gather(lse).masked_fill_(pairs.queries.slots < 0, torch.inf).unsqueeze(2)
    deltas = pairs.queries.gather(delta).unsqueeze(2)
    dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for chunk, index, query, key in pairs.chunks():
        pair_q, pair_k, pair_d_out = queries[query], keys[key], d_outs[query]
        p = torch.baddbmm(group.bias(pairs, query, key), pair_q, pair_k.transpose(1, 2))
        p.sub_(lses[query]).exp2_()
        ds = torch.bmm(pair_d_out, values[key].transpose(1, 2))
        dropped = p
        if group.options.dropout > 0:
            factors = group.dropout_factors(pairs, query, key)
            dropped = p * factors
            ds.mul_(factors)
        ds.sub_(deltas[query]).mul_(p)
        dv.index_add_(0, key, torch.bmm(dropped.transpose(1, 2), pair_d_out))
        dk.index_add_(0, key, torch.bmm(ds.transpose(1, 2), pair_q))
        dq[chunk].index_add_(0, index, torch.bmm(ds, pair_k))
    return pairs.queries.to_rows(dq), pairs.keys.to_rows(dk), pairs.keys.to_rows(dv)


def _groups(
    query_ids: Tensor, key_ids: Tensor, options: CrossOptions, key_padding_mask: Tensor | None
) -> Iterator[_Group]:
    batch, n_heads, n_rounds, n_queries = query_ids.shape
    n_keys, device = key_ids.shape[3], query_ids.device
    head_indices = options.head_indices(batch, n_heads, device)
    query_buckets = query_ids.flatten(0, 1)
    key_buckets = mark_padding(key_ids, options.n_buckets, key_padding_mask)
    kind = "cuda" if query_ids.is_cuda else "cpu"
    size = max(1, GROUP_TOKENS[kind] // (n_queries + n_keys))
    for first in range(0, batch * n_heads, size):
        heads = slice(first, min(first + size, batch * n_heads))
        rounds = [
            _pair_tiles(r, query_buckets[heads, r], key_buckets[heads, r], options.n_buckets, CHUNK_SCORES[kind])
            for r in range(n_rounds)
        ]
        yield _Group(
            options,
            slice(heads.start * n_queries, heads.stop * n_queries),
            slice(heads.start * n_keys, heads.stop * n_keys),
            rounds,
            query_buckets[heads].transpose(0, 1).flatten(1),
            key_buckets[heads].transpose(0, 1).flatten(1),
            _row_coords(head_indices[heads], n_queries),
            _row_coords(head_indices[heads], n_keys),
        )


def _row_coords(head_indices: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """Head index and position of each row of full sequences."""
    position = torch.arange(seq_len, device=head_indices.device)
    return head_indices.repeat_interleave(seq_len), position.repeat(head_indices.numel())


def _pair_tiles(round_: int, query_ids: Tensor, key_ids: Tensor, n_buckets: int, chunk_scores: int) -> _TilePairs:
    """Tiles of a round's ids [BH, S] and [BH, T], where n_buckets marks padding, and the pairs of a bucket."""
    mean_size = max(1, min(query_ids.shape[1], key_ids.shape[1]) // n_buckets)
    tile_len = 16
    while tile_len < 64 and 4 * tile_len <= mean_size:
        tile_len *= 2
    queries, query_tiles = _tile(query_ids, n_buckets, tile_len)
    keys, key_tiles = _tile(key_ids, n_buckets, tile_len)
    first_key_tile = np.cumsum(key_tiles) - key_tiles
    bucket_of_tile = np.repeat(np.arange(query_tiles.size), query_tiles)
    n_pairs = key_tiles[bucket_of_tile]
    ends = np.cumsum(n_pairs)
    query_tile = np.repeat(np.arange(bucket_of_tile.size), n_pairs)
    offset = np.arange(query_tile.size) - np.repeat(ends - n_pairs, n_pairs)
    key_tile = first_key_tile[bucket_of_tile[query_tile]] + offset
    max_pairs = max(1, chunk_scores // tile_len**2)
    borders = [0]
    while borders[-1] < query_tile.size:
        # up to the end of the last query tile that fits, or of the next one if none does
        n_fitting = np.searchsorted(ends, borders[-1] + max_pairs, side="right")
        end = int(ends[n_fitting - 1]) if n_fitting > 0 else 0
        if end <= borders[-1]:
            end = int(ends[np.searchsorted(ends, borders[-1], side="right")])
        borders.append(end)
    device = query_ids.device
    query, key = (torch.from_numpy(x).to(device) for x in (query_tile, key_tile))
    return _TilePairs(round_, queries, keys, query, key, borders)


def _tile(ids: Tensor, n_buckets: int, tile_len: int) -> tuple[_Tiles, np.ndarray[Any, np.dtype[np.int64]]]:
    """Tiles of ids [BH, S], in order of (head, bucket), and the number of tiles of each (head, bucket)."""
    n_heads = ids.shape[0]
    head = torch.arange(n_heads, device=ids.device).unsqueeze(1)
    is_absent = ids == n_buckets
    keys = (head * n_buckets + ids.long()).masked_fill_(is_absent, n_heads * n_buckets)
    sort_keys = keys.flatten().cpu().numpy()
    counts = np.bincount(sort_keys, minlength=n_heads * n_buckets + 1)[:-1]
    n_present = int(counts.sum())
    order = radix_argsort(sort_keys)[:n_present]
    tiles = -(-counts // tile_len)
    n_slots = int(tiles.sum()) * tile_len
    start = (np.cumsum(tiles) - tiles) * tile_len
    slot = np.arange(n_present) + np.repeat(start - (np.cumsum(counts) - counts), counts)
    slots, slot_of_row = np.full(n_slots, -1), np.full(sort_keys.size, n_slots)
    slots[slot], slot_of_row[order] = order, slot
    on_device = [torch.from_numpy(x).to(ids.device) for x in (slots, slot_of_row)]
    return _Tiles(on_device[0].view(-1, tile_len), on_device[1]), tiles
