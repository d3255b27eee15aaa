"""Attention over LSH neighbourhoods in plain PyTorch, tile by tile; its backward needs no per-round state.

Rounds are attended one after another and merged into one running softmax, as flash attention does with blocks
of keys. With the final output `o` and the total logsumexp saved, each round's probabilities are exp(s - lse)
and dS = P * (dO.V - rowsum(dO * o)). So forward keeps S * D + S numbers per head whatever the number of
rounds, and nothing of size n_hashes * seq_len * head_dim ever exists. Scores, logsumexp and accumulators are
float32 in every dtype.

The tensors of one group of heads are flat: [heads * seq_len, head_dim].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reformer_dist.ops.lsh.layout import Layout, build_layouts, tiling_of
from reformer_dist.ops.lsh.pair_mask import PairMask
from reformer_dist.ops.lsh.rules import ChunkRule, Rule
from reformer_dist.ops.workspace import Workspace

# Stands for "no key seen yet" in running maxima: finite, so that differences of two of them are 0, not nan.
LOWEST = -1e30
# Tokens whose sorted copies exist at a time, and scores that exist at a time: they fit the caches of a core.
GROUP_TOKENS = {"cpu": 2**14, "cuda": 2**20}
BLOCK_SCORES = {"cpu": 2**18, "cuda": 2**27}


@dataclass(frozen=True)
class AttentionOptions:
    """What stays fixed over the heads and rounds of one call."""

    rule: Rule
    n_buckets: int
    scale: float
    count_pairs_once: bool = False
    dropout: float = 0.0
    dropout_seed: int = 0


def bucket_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bucket_ids: Tensor,
    options: AttentionOptions,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Softmax over the union of what each token meets in its rounds (paper, eq. 2 to 4).

    q, k, v [B, H, S, D] -> [B, H, S, D] in v's dtype; bucket_ids [B, H, R, S] integers below
    options.n_buckets; key_padding_mask [B, S], True for real tokens. A token that meets nobody attends to
    itself. The same function as `reference_attention`, in O(R * S * window) time.
    """
    out: Tensor = _BucketAttention.apply(q, k, v, bucket_ids, options, key_padding_mask)
    return out


class _BucketAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bucket_ids: Tensor,
        options: AttentionOptions,
        key_padding_mask: Tensor | None,
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(v)
        lse = torch.empty(v.shape[:3], dtype=torch.float32, device=v.device)
        with torch.autocast(v.device.type, enabled=False):
            for group in _groups(bucket_ids, options, key_padding_mask):
                o, group_lse = _forward_group(group, *(_flat(t)[group.tokens] for t in (q, k, v)))
                _flat(out)[group.tokens] = o
                lse.view(-1)[group.tokens] = group_lse
        ctx.save_for_backward(q, k, v, bucket_ids, out, lse, key_padding_mask)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bucket_ids, out, lse, key_padding_mask = ctx.saved_tensors
        d_out = grads[0].contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        with torch.autocast(v.device.type, enabled=False):
            for group in _groups(bucket_ids, ctx.options, key_padding_mask):
                flat = [_flat(t)[group.tokens] for t in (q, k, v, out, d_out)]
                found = _backward_group(group, *flat, lse=lse.view(-1)[group.tokens])
                for whole, part in zip((dq, dk, dv), found, strict=True):
                    _flat(whole)[group.tokens] = part
        return dq, dk, dv, None, None, None


def _flat(t: Tensor) -> Tensor:
    return t.view(-1, t.shape[-1])


@dataclass(frozen=True)
class _Group:
    """Some consecutive (batch, head) pairs, small enough for their sorted copies to stay in the caches."""

    tokens: slice
    options: AttentionOptions
    layouts: list[Layout]
    masks: list[PairMask]
    block_tiles: int
    scratch: Workspace

    def rounds(self) -> Iterator[tuple[Layout, PairMask]]:
        return zip(self.layouts, self.masks, strict=True)


def _groups(bucket_ids: Tensor, options: AttentionOptions, key_padding_mask: Tensor | None) -> Iterator[_Group]:
    batch, n_heads, n_hashes, seq_len = bucket_ids.shape
    buckets = bucket_ids.reshape(batch * n_heads, n_hashes, seq_len)
    padding = None
    if key_padding_mask is not None:
        padding = (~key_padding_mask).repeat_interleave(n_heads, dim=0)
    device = "cuda" if bucket_ids.is_cuda else "cpu"
    tiling = tiling_of(options.rule, seq_len, options.n_buckets)
    block_tiles = max(1, BLOCK_SCORES[device] // (tiling.tile_len * tiling.columns))
    size = max(1, GROUP_TOKENS[device] // seq_len)
    scratch = Workspace(bucket_ids.device)
    for first in range(0, batch * n_heads, size):
        heads = slice(first, min(first + size, batch * n_heads))
        group_padding = padding[heads] if padding is not None else None
        layouts = build_layouts(buckets[heads], options.rule, options.n_buckets, group_padding)
        masks = [
            PairMask(layouts, round_, options, first_head=first, seq_len=seq_len) for round_ in range(n_hashes)
        ]
        tokens = slice(heads.start * seq_len, heads.stop * seq_len)
        yield _Group(tokens, options, layouts, masks, block_tiles, scratch)


def _windows(rows: Tensor, layout: Layout, first_tile: int, n_tiles: int) -> Tensor:
    """The keys that each tile looks at, as an overlapping view [tiles, columns, D] of [slots, D]."""
    tile_len, columns = layout.tiling.tile_len, layout.tiling.columns
    width = rows.shape[1]
    return rows.as_strided((n_tiles, columns, width), (tile_len * width, width, 1), first_tile * tile_len * width)


def _blocks(layout: Layout, block_tiles: int) -> Iterator[tuple[int, int]]:
    """(first tile, tiles) of consecutive blocks."""
    for first in range(0, layout.n_tiles, block_tiles):
        yield first, min(block_tiles, layout.n_tiles - first)


def _forward_group(group: _Group, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [tokens, D] and total logsumexp [tokens] of a group; lse is +inf for tokens that met nobody."""
    total: tuple[Tensor, Tensor, Tensor] | None = None
    for layout, mask in group.rounds():
        in_slots = _attend_round(group, layout, mask, q, k, v)
        o, biggest, weight = in_slots
        # the first round's sums become the running ones
        name = "total" if total is None else "round"
        at_home = (group.scratch.gather(name, o, layout.home), biggest[layout.home], weight[layout.home])
        total = at_home if total is None else _merge(total, at_home)
    assert total is not None
    o, biggest, weight = total
    alone = weight == 0
    o = torch.where(alone.unsqueeze(1), v.float(), o / weight.unsqueeze(1))
    return o, (biggest + weight.log()).masked_fill_(alone, torch.inf)


def _merge(a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Two partial softmaxes (sum of exp(s - max) v, max, sum of exp(s - max)) as one."""
    (o_a, max_a, weight_a), (o_b, max_b, weight_b) = a, b
    biggest = torch.maximum(max_a, max_b)
    factor_a, factor_b = (max_a - biggest).exp_(), (max_b - biggest).exp_()
    o = o_a.mul_(factor_a.unsqueeze(1)).addcmul_(o_b, factor_b.unsqueeze(1))
    return o, biggest, weight_a.mul_(factor_a).addcmul_(weight_b, factor_b)


def _attend_round(
    group: _Group, layout: Layout, mask: PairMask, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One round's partial softmax by slot: sum of exp(s - max) v [slots, D], max [slots], weight [slots]."""
    scratch = group.scratch
    q_slots = scratch.gather("q", q, layout.query_slots).mul_(group.options.scale)
    k_slots = scratch.gather("k", k, layout.key_slots)
    v_slots = scratch.gather("v", v, layout.key_slots)
    tile_len, width = layout.tiling.tile_len, q.shape[1]
    o = scratch.rows("o", *q_slots.shape)
    biggest = torch.empty(o.shape[0], dtype=torch.float32, device=o.device)
    weight = torch.empty_like(biggest)
    for first, n_tiles in _blocks(layout, group.block_tiles):
        span = slice(first * tile_len, (first + n_tiles) * tile_len)
        q_tiles = q_slots[span].view(n_tiles, tile_len, width)
        keys = _windows(k_slots, layout, first, n_tiles)
        scores = mask.scores(first, n_tiles).baddbmm_(q_tiles, keys.transpose(1, 2))
        top = scores.amax(dim=2).clamp_min_(LOWEST)
        p = scores.sub_(top.unsqueeze(2)).exp_()
        biggest[span] = top.view(-1)
        weight[span] = p.sum(dim=2).view(-1)
        if group.options.dropout > 0:
            p.mul_(mask.dropout_factors(first, n_tiles))
        torch.bmm(p, _windows(v_slots, layout, first, n_tiles), out=o[span].view(n_tiles, tile_len, width))
    return o, biggest, weight


def _backward_group(
    group: _Group, q: Tensor, k: Tensor, v: Tensor, o: Tensor, d_out: Tensor, *, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v [tokens, D] in float32."""
    delta = (d_out.float() * o.float()).sum(dim=1)
    alone = torch.isinf(lse)
    dq, dk = torch.zeros_like(q, dtype=torch.float32), torch.zeros_like(k, dtype=torch.float32)
    # who met nobody has o = v
    dv = d_out.float() * alone.unsqueeze(1)
    is_wrapped = isinstance(group.options.rule, ChunkRule) and group.options.rule.wrap
    for layout, mask in group.rounds():
        dq_slots, dk_slots, dv_slots = _backward_round(group, layout, mask, q, k, v, d_out, delta, lse)
        dq += group.scratch.gather("home", dq_slots, layout.home)
        for whole, part in ((dk, dk_slots), (dv, dv_slots)):
            if is_wrapped:  # a key may stand in several slots
                is_taken = layout.key_slots >= 0
                rows = part[: is_taken.numel()][is_taken]
                whole.index_add_(0, layout.key_slots[is_taken], rows)
            else:
                whole += group.scratch.gather("home", part, layout.home + layout.tiling.back)
    return dq.mul_(group.options.scale), dk, dv


def _backward_round(
    group: _Group,
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
    scratch = group.scratch
    q_slots = scratch.gather("q", q, layout.query_slots).mul_(group.options.scale)
    do_slots = scratch.gather("d_out", d_out, layout.query_slots)
    k_slots = scratch.gather("k", k, layout.key_slots)
    v_slots = scratch.gather("v", v, layout.key_slots)
    is_empty = layout.query_slots < 0
    own = layout.query_slots.clamp_min(0)
    # exp(s - inf) = 0: empty slots give nothing to anybody
    lse_slots = lse[own].masked_fill_(is_empty, torch.inf)
    delta_slots = delta[own]
    tile_len, width = layout.tiling.tile_len, q.shape[1]
    dq = scratch.rows("dq", *q_slots.shape)
    n_sums = (layout.n_tiles - 1 - (-layout.tiling.columns // tile_len)) * tile_len
    dk, dv = (scratch.rows(name, n_sums, width).zero_() for name in ("dk", "dv"))
    for first, n_tiles in _blocks(layout, group.block_tiles):
        span = slice(first * tile_len, (first + n_tiles) * tile_len)
        q_tiles = q_slots[span].view(n_tiles, tile_len, width)
        do_tiles = do_slots[span].view(n_tiles, tile_len, width)
        keys = _windows(k_slots, layout, first, n_tiles)
        values = _windows(v_slots, layout, first, n_tiles)
        p = mask.scores(first, n_tiles).baddbmm_(q_tiles, keys.transpose(1, 2))
        p.sub_(lse_slots[span].view(n_tiles, tile_len, 1)).exp_()
        dp = torch.bmm(do_tiles, values.transpose(1, 2))
        if group.options.dropout > 0:
            factors = mask.dropout_factors(first, n_tiles)
            dp.mul_(factors)
            dropped = p * factors
        else:
            dropped = p
        _add_windows(dv, torch.bmm(dropped.transpose(1, 2), do_tiles), layout, first)
        ds = dp.sub_(delta_slots[span].view(n_tiles, tile_len, 1)).mul_(p)
        torch.bmm(ds, keys, out=dq[span].view(n_tiles, tile_len, width))
        _add_windows(dk, torch.bmm(ds.transpose(1, 2), q_tiles), layout, first)
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
