"""The arithmetic of attention over laid-out rows, tile by tile; its backward needs no per-round state.

Rounds are attended one after another and merged into one running softmax, as flash attention does with blocks
of keys. With the final output `o` and the total logsumexp saved, each round's probabilities are exp(s - lse)
and dS = P * (dO.V - rowsum(dO * o)). So forward keeps S * D + S numbers per head whatever the number of
rounds, and nothing of size n_hashes * seq_len * head_dim ever exists. Scores, logsumexp and accumulators are
float32 in every dtype.

Rows are [n_rows, head_dim]: tokens of some units, laid out by `layout` for each round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.lsh.layout import Layout
from reformer_dist.ops.lsh.pair_mask import PairMask, Rows
from reformer_dist.ops.lsh.rules import AttentionOptions
from reformer_dist.ops.workspace import Workspace

# Stands for "no key seen yet" in running maxima: finite, so that differences of two of them are 0, not nan.
LOWEST = -1e30
# Slots that are gathered at a time, and scores that exist at a time: they fit the caches of a core.
SPAN_SLOTS = {"cpu": 2**14, "cuda": 2**20}
BLOCK_SCORES = {"cpu": 2**18, "cuda": 2**27}


@dataclass(frozen=True)
class Sums:
    """A partial softmax of each row: what its scores s have summed up to so far."""

    o: Tensor
    """[n_rows, D] float32: sum of exp(s - top) v."""
    top: Tensor
    """[n_rows] largest s."""
    weight: Tensor
    """[n_rows] sum of exp(s - top); 0 for rows that met nobody."""

    def merge(self, other: Sums) -> Sums:
        """Both as one; this one's memory is used up."""
        top = torch.maximum(self.top, other.top)
        factor, other_factor = (self.top - top).exp_(), (other.top - top).exp_()
        o = self.o.mul_(factor.unsqueeze(1)).addcmul_(other.o, other_factor.unsqueeze(1))
        return Sums(o, top, self.weight.mul_(factor).addcmul_(other.weight, other_factor))

    def output(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output [n_rows, D] and logsumexp [n_rows], float32; v and +inf for rows that met nobody."""
        alone = self.weight == 0
        o = torch.where(alone.unsqueeze(1), v.float(), self.o / self.weight.unsqueeze(1))
        return o, (self.top + self.weight.log()).masked_fill_(alone, torch.inf)


@dataclass(frozen=True)
class RowGroup:
    """Rows that are attended together, few enough for their sorted copies to stay in the caches."""

    options: AttentionOptions
    layouts: list[Layout]
    masks: list[PairMask]
    block_tiles: int
    scratch: Workspace

    @staticmethod
    def of(rows: Rows, layouts: list[Layout], options: AttentionOptions, scratch: Workspace) -> RowGroup:
        tiling = layouts[0].tiling
        device = "cuda" if rows.unit.is_cuda else "cpu"
        block_tiles = max(1, BLOCK_SCORES[device] // (tiling.tile_len * tiling.columns))
        masks = [PairMask(layout, round_, rows, options) for round_, layout in enumerate(layouts)]
        return RowGroup(options, layouts, masks, block_tiles, scratch)

    def rounds(self) -> Iterator[tuple[Layout, PairMask]]:
        return zip(self.layouts, self.masks, strict=True)


def attend_rounds(group: RowGroup, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Sums]:
    """Each round's own sums, in the order of the rounds; q, k, v [n_rows, D].

    They live in scratch memory: the first round's until the end, another's until the next is asked for.
    """
    for round_, (layout, mask) in enumerate(group.rounds()):
        if q.shape[0] == 0:  # a rank may have nothing to attend
            yield Sums(v.float(), v.new_empty(0, dtype=torch.float32), v.new_empty(0, dtype=torch.float32))
            continue
        o, top, weight = _attend_round(group, layout, mask, q, k, v)
        name = "total" if round_ == 0 else "round"
        yield Sums(group.scratch.gather(name, o, layout.home), top[layout.home], weight[layout.home])


def attend(group: RowGroup, q: Tensor, k: Tensor, v: Tensor) -> Sums:
    """The sums over all rounds."""
    rounds = attend_rounds(group, q, k, v)
    total = next(rounds)
    for sums in rounds:
        total = total.merge(sums)
    return total


@dataclass(frozen=True)
class _Span:
    """Consecutive tiles whose queries and keys are gathered together."""

    layout: Layout
    first_tile: int
    n_tiles: int

    @property
    def slots(self) -> slice:
        tile_len = self.layout.tiling.tile_len
        return slice(self.first_tile * tile_len, (self.first_tile + self.n_tiles) * tile_len)

    @property
    def queries(self) -> Tensor:
        return self.layout.query_slots[self.slots]

    @property
    def keys(self) -> Tensor:
        tiling, slots = self.layout.tiling, self.slots
        return self.layout.key_slots[slots.start : slots.stop + tiling.back + tiling.front]

    def windows(self, rows: Tensor, first: int, n_tiles: int) -> Tensor:
        """The keys that each tile looks at, as an overlapping view [tiles, columns, D] of the span's key rows."""
        tile_len, columns = self.layout.tiling.tile_len, self.layout.tiling.columns
        width = rows.shape[1]
        return rows.as_strided((n_tiles, columns, width), (tile_len * width, width, 1), first * tile_len * width)

    def blocks(self, block_tiles: int) -> Iterator[tuple[int, int]]:
        """(first tile within the span, tiles) of consecutive blocks."""
        for first in range(0, self.n_tiles, block_tiles):
            yield first, min(block_tiles, self.n_tiles - first)


def _spans(layout: Layout) -> Iterator[_Span]:
    device = "cuda" if layout.home.is_cuda else "cpu"
    size = max(1, SPAN_SLOTS[device] // layout.tiling.tile_len)
    for first in range(0, layout.n_tiles, size):
        yield _Span(layout, first, min(size, layout.n_tiles - first))


def _attend_round(
    group: RowGroup, layout: Layout, mask: PairMask, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One round's partial softmax by slot: sum of exp(s - top) v [slots, D], top [slots], weight [slots]."""
    scratch, tile_len, width = group.scratch, layout.tiling.tile_len, q.shape[1]
    o = scratch.rows("o", layout.query_slots.numel(), width)
    tops = torch.empty(o.shape[0], dtype=torch.float32, device=o.device)
    weights = torch.empty_like(tops)
    for span in _spans(layout):
        q_slots = scratch.gather("q", q, span.queries).mul_(group.options.scale).view(-1, tile_len, width)
        k_slots, v_slots = scratch.gather("k", k, span.keys), scratch.gather("v", v, span.keys)
        o_tiles = o[span.slots].view(-1, tile_len, width)
        top_tiles, weight_tiles = (t[span.slots].view(-1, tile_len) for t in (tops, weights))
        for first, n_tiles in span.blocks(group.block_tiles):
            tiles = slice(first, first + n_tiles)
            keys = span.windows(k_slots, first, n_tiles)
            scores = mask.scores(span.first_tile + first, n_tiles).baddbmm_(q_slots[tiles], keys.transpose(1, 2))
            top = scores.amax(dim=2).clamp_min_(LOWEST)
            p = scores.sub_(top.unsqueeze(2)).exp_()
            top_tiles[tiles] = top
            weight_tiles[tiles] = p.sum(dim=2)
            if group.options.dropout > 0:
                p.mul_(mask.dropout_factors(span.first_tile + first, n_tiles))
            torch.bmm(p, span.windows(v_slots, first, n_tiles), out=o_tiles[tiles])
    return o, tops, weights


def attend_backward(
    group: RowGroup, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, *, delta: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v [n_rows, D] in float32, but for rows that met nobody (their o is v).

    delta [n_rows] = rowsum(dO * o) and lse [n_rows] are those of the whole softmax; lse = inf silences a row.
    """
    dq, dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (q, k, v))
    for layout, mask in group.rounds() if q.shape[0] else ():
        dq_slots, dk_slots, dv_slots = _backward_round(group, layout, mask, q, k, v, d_out, delta, lse)
        dq += group.scratch.gather("home", dq_slots, layout.home)
        for whole, part in ((dk, dk_slots), (dv, dv_slots)):
            if layout.key_home is None:
                is_taken = layout.key_slots >= 0
                rows = part[: is_taken.numel()][is_taken]
                whole.index_add_(0, layout.key_slots[is_taken], rows)
            else:
                whole += group.scratch.gather("home", part, layout.key_home + layout.tiling.back)
    return dq.mul_(group.options.scale), dk, dv


def _backward_round(
    group: RowGroup,
    layout: Layout,
    mask: PairMask,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    delta: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One round's gradients by slot: dq / scale of the query slots; dk and dv of the key slots."""
    scratch, tile_len, width = group.scratch, layout.tiling.tile_len, q.shape[1]
    dq = scratch.rows("dq", layout.query_slots.numel(), width)
    n_sums = (layout.n_tiles - 1 - (-layout.tiling.columns // tile_len)) * tile_len
    dk, dv = (scratch.rows(name, n_sums, width).zero_() for name in ("dk", "dv"))
    for span in _spans(layout):
        q_slots = scratch.gather("q", q, span.queries).mul_(group.options.scale).view(-1, tile_len, width)
        do_slots = scratch.gather("d_out", d_out, span.queries).view(-1, tile_len, width)
        k_slots, v_slots = scratch.gather("k", k, span.keys), scratch.gather("v", v, span.keys)
        own = span.queries.clamp_min(0)
        # exp(s - inf) = 0: empty slots give nothing to anybody
        lse_slots = lse[own].masked_fill_(span.queries < 0, torch.inf).view(-1, tile_len, 1)
        delta_slots = delta[own].view(-1, tile_len, 1)
        dq_tiles = dq[span.slots].view(-1, tile_len, width)
        for first, n_tiles in span.blocks(group.block_tiles):
            tiles, place = slice(first, first + n_tiles), span.first_tile + first
            keys, values = (span.windows(rows, first, n_tiles) for rows in (k_slots, v_slots))
            p = mask.scores(place, n_tiles).baddbmm_(q_slots[tiles], keys.transpose(1, 2))
            p.sub_(lse_slots[tiles]).exp_()
            dp = torch.bmm(do_slots[tiles], values.transpose(1, 2))
            dropped = p
            if group.options.dropout > 0:
                factors = mask.dropout_factors(place, n_tiles)
                dp.mul_(factors)
                dropped = p * factors
            _add_windows(dv, torch.bmm(dropped.transpose(1, 2), do_slots[tiles]), layout, place)
            ds = dp.sub_(delta_slots[tiles]).mul_(p)
            torch.bmm(ds, keys, out=dq_tiles[tiles])
            _add_windows(dk, torch.bmm(ds.transpose(1, 2), q_slots[tiles]), layout, place)
    return dq, dk, dv


def _add_windows(rows: Tensor, windows: Tensor, layout: Layout, first_tile: int) -> None:
    """Adds overlapping windows [tiles, columns, D] into the rows [slots, D] that they stand for.

    The rows reach beyond the last slot, so that the last window ends on a tile border.
    """
    tile_len, columns = layout.tiling.tile_len, layout.tiling.columns
    n_tiles, _, width = windows.shape
    tiles = rows.view(-1, tile_len, width)
    for shift, start in enumerate(range(0, columns, tile_len)):
        part = windows[:, start : start + tile_len]
        first = first_tile + shift
        tiles[first : first + n_tiles, : part.shape[1]] += part
