"""The arithmetic of attention over laid-out rows, block by block; its backward needs no per-round state.

Rounds are attended one after another and merged into one running softmax, as flash attention does with blocks
of keys. With the final output `o` and the total logsumexp saved, each round's probabilities are 2^(s - lse)
and dS = P * (dO.V - rowsum(dO * o)). So forward saves S * D + S numbers per head whatever the number of
rounds, and no tensor of size n_hashes * seq_len * head_dim ever exists. Scores, logsumexp and accumulators are
float32 in every dtype.

Rows are [n_rows, head_dim]: the tokens of a group of heads, laid out by `layout` for each round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.lsh.online_softmax import LOG2_E, LOG_2, LOWEST, PartialSoftmax
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.torch_tiles import products
from reformer_dist.ops.lsh.torch_tiles.layout import Layout
from reformer_dist.ops.lsh.torch_tiles.pair_mask import PairMask
from reformer_dist.ops.lsh.torch_tiles.products import Pairs, add_products, gather_tiles, transposed
from reformer_dist.ops.lsh.torch_tiles.tiles import SPAN_SLOTS
from reformer_dist.ops.workspace import Workspace, gather_rows


@dataclass(frozen=True)
class RowGroup:
    """Rows that are attended together, few enough for their sorted copies to stay in the caches."""

    options: AttentionOptions
    layouts: list[Layout]
    masks: list[PairMask]
    scratch: Workspace

    def rounds(self) -> Iterator[tuple[Layout, PairMask]]:
        return zip(self.layouts, self.masks, strict=True)

    def key_buffer(self, name: str, layout: Layout, width: int) -> Tensor:
        """Buffer for the slots of a layout's keys [slots, width]; all rounds fit into that of the first."""
        most = max(each.key_slots.numel() for each in self.layouts)
        return self.scratch.rows(name, most, width)[: layout.key_slots.numel()]

    def scaled(self, q: Tensor) -> Tensor:
        """Queries scaled so that q.k is the score in base 2."""
        return torch.mul(q, self.options.scale * LOG2_E, out=self.scratch.rows("scaled", *q.shape))


def attend_rounds(group: RowGroup, q: Tensor, k: Tensor, v: Tensor) -> Iterator[PartialSoftmax]:
    """The partial softmax of each round, in order; q, k, v [n_rows, D]."""
    q, k, v = group.scaled(q), k.float(), v.float()
    for layout, mask in group.rounds():
        if q.shape[0] == 0:  # a rank may have no tokens to attend
            yield PartialSoftmax(v, v.new_empty(0), v.new_empty(0))
            continue
        o, row_max, row_sum = _attend_round(group, layout, mask, q, k, v)
        slots = layout.slot_of_row
        yield PartialSoftmax(gather_rows(o, slots), row_max[slots], row_sum[slots])


def attend(group: RowGroup, q: Tensor, k: Tensor, v: Tensor) -> PartialSoftmax:
    """The softmax over all rounds."""
    return functools.reduce(PartialSoftmax.merge, attend_rounds(group, q, k, v))


def _attend_round(
    group: RowGroup, layout: Layout, mask: PairMask, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of one round's PartialSoftmax, by slot: [slots, D], [slots], [slots]."""
    tile_len = layout.tiling.tile_len
    o = group.scratch.rows("o", layout.query_slots.numel(), q.shape[1]).view(layout.n_tiles, tile_len, -1)
    row_max = torch.full(o.shape[:2], LOWEST, dtype=torch.float32, device=o.device)
    row_sum = torch.zeros_like(row_max)
    o[-1] = 0  # the empty tile, for rows that are not queries
    query_rows, key_rows = layout.gather_indices()
    for span in layout.spans:
        queries = gather_tiles(q, query_rows, tile_len, span.start, span.stop)
        keys, values = (gather_tiles(x, key_rows, tile_len, *span.key_tiles) for x in (k, v))
        first_key = span.key_tiles[0]
        pairs = Pairs(layout, span, group.scratch)
        p = pairs.buffer("scores")
        for part, column in zip(pairs.by_column(p), span.columns, strict=True):
            part.copy_(mask.bias(column))
        p_runs = pairs.by_run(p)
        add_products(p_runs, pairs.at_queries(queries, span.start), transposed(pairs.at_keys(keys, first_key)))
        tiles = span.columns[0].queries
        row_max[tiles] = span_max = _reduce_columns(torch.maximum, p.amax(dim=2), pairs).clamp_min_(LOWEST)
        for part, part_max in zip(pairs.by_column(p), pairs.by_queries(span_max), strict=True):
            part.sub_(part_max.unsqueeze(2))
        p.exp2_()
        row_sum[tiles] = _reduce_columns(torch.add, p.sum(dim=2), pairs)
        if group.options.dropout > 0:
            for part, column in zip(pairs.by_column(p), span.columns, strict=True):
                part.mul_(mask.dropout_factors(column))
        products.sum_products(pairs.at_queries(o), p_runs, pairs.at_keys(values, first_key))
    return o.flatten(0, 1), row_max.flatten(), row_sum.flatten()


def _reduce_columns(op: Callable[..., Tensor], x: Tensor, pairs: Pairs) -> Tensor:
    """Reduces x [pairs, tile_len] over the columns, in order: [tiles, tile_len].

    A column that the first tiles of a bucket lack is therefore bitwise equivalent to one of masked pairs.
    """
    total, *others = pairs.by_column(x)
    for part, other in zip(pairs.by_queries(total)[1:], others, strict=True):
        op(part, other, out=part)
    return total


def attend_backward(
    group: RowGroup, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, *, delta: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v [n_rows, D] in float32.

    delta [n_rows] = rowsum(dO * o) and lse [n_rows] are those of the total softmax; lse = inf excludes a query.
    """
    dq, dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (q, k, v))
    scaled = group.scaled(q)
    k, v, d_out = k.float(), v.float(), d_out.float()
    for layout, mask in group.rounds() if q.shape[0] else ():
        dq_slots, dk_slots, dv_slots = _backward_round(group, layout, mask, scaled, k, v, d_out, delta, lse)
        dq += gather_rows(dq_slots, layout.slot_of_row)
        for total, by_slot in ((dk, dk_slots), (dv, dv_slots)):
            if layout.key_slot_of_row is None:
                _add_slots(total, layout.key_slots, by_slot)
            else:
                total += gather_rows(by_slot, layout.key_slot_of_row)
    return dq.mul_(group.options.scale), dk.mul_(LOG_2), dv


def _add_slots(total: Tensor, rows: Tensor, by_slot: Tensor) -> None:
    """Adds the gradients of slots [slots, D] to those of their rows; rows [slots], -1 for empty slots."""
    size = SPAN_SLOTS["cuda" if rows.is_cuda else "cpu"]
    for some_rows, grads in zip(rows.split(size), by_slot.split(size), strict=True):
        is_taken = some_rows >= 0
        total.index_add_(0, some_rows[is_taken], grads[is_taken])


def _backward_round(
    group: RowGroup, layout: Layout, mask: PairMask,
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, delta: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One round's gradients by slot: dq / scale, dk / log 2 and dv; q is scaled, lse in base 2."""
    tile_len, width = layout.tiling.tile_len, q.shape[1]
    dq = group.scratch.rows("dq", layout.query_slots.numel(), width).view(layout.n_tiles, tile_len, width)
    dk, dv = (group.key_buffer(name, layout, width).view(-1, tile_len, width) for name in ("dk", "dv"))
    # without tiles after the query's, the first run covers all keys, and the other runs add to them
    looks_ahead = layout.tiling.n_after > 0
    add_to_keys = add_products if looks_ahead else products.sum_products
    if layout.query_ranks is not None:  # each run has keys of its own
        looks_ahead, add_to_keys = False, products.set_products
    for grad in (dq, dk, dv):
        # the last tile is that of absent rows
        (grad if looks_ahead else grad[-1]).zero_()
    query_rows, key_rows = layout.gather_indices()
    # empty slots (-1) get lse = inf, so their probabilities are 0
    lse = torch.cat([lse, lse.new_full((1,), torch.inf)])
    for span in layout.spans:
        queries, d_outs = (gather_tiles(x, query_rows, tile_len, span.start, span.stop) for x in (q, d_out))
        keys, values = (gather_tiles(x, key_rows, tile_len, *span.key_tiles) for x in (k, v))
        pairs = Pairs(layout, span, group.scratch)
        tiles = span.columns[0].queries
        slots = layout.query_slots[tiles.start * tile_len : tiles.stop * tile_len]
        lses, deltas = (pairs.by_queries(x[slots].view(-1, tile_len, 1)) for x in (lse, delta))
        p, ds = pairs.buffer("scores"), pairs.buffer("ds")
        p_runs, ds_runs = pairs.by_run(p), pairs.by_run(ds)
        at_queries, at_d_outs = (pairs.at_queries(x, span.start) for x in (queries, d_outs))
        at_keys, at_values = (pairs.at_keys(x, span.key_tiles[0]) for x in (keys, values))
        for part, column, part_lse in zip(pairs.by_column(p), span.columns, lses, strict=True):
            torch.sub(mask.bias(column), part_lse, out=part)
        add_products(p_runs, at_queries, transposed(at_keys))
        p.exp2_()
        products.set_products(ds_runs, at_d_outs, transposed(at_values))
        dropped = p_runs
        if group.options.dropout > 0:
            kept = p.clone()
            for part, d_part, column in zip(pairs.by_column(kept), pairs.by_column(ds), span.columns, strict=True):
                factors = mask.dropout_factors(column)
                part.mul_(factors)
                d_part.mul_(factors)
            dropped = pairs.by_run(kept)
        add_to_keys(pairs.at_keys(dv), transposed(dropped), at_d_outs)
        for part, part_delta in zip(pairs.by_column(ds), deltas, strict=True):
            part.sub_(part_delta)
        ds.mul_(p)
        products.sum_products(pairs.at_queries(dq), ds_runs, at_keys)
        add_to_keys(pairs.at_keys(dk), transposed(ds_runs), at_queries)
    return dq.flatten(0, 1), dk.flatten(0, 1), dv.flatten(0, 1)
