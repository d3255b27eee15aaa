"""Whole attention put together from what each of several parts makes of the rows that it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.lsh import AttentionOptions, WindowRule
from reformer_dist.ops.lsh.backends import attention_of_held
from reformer_dist.ops.lsh.held import HeldRows, Rows
from reformer_dist.ops.lsh.partition import Partition, choose_tiling, window_partition
from reformer_dist.ops.lsh.sorting import (
    bucket_ranks,
    count_buckets,
    full_position_codes,
    mark_padding,
    row_sort_keys,
)
from reformer_dist.ops.workspace import Workspace


@dataclass(frozen=True)
class HeldPart:
    held: HeldRows
    number: Tensor
    """[rows] of each row in [B * H * S]."""
    is_query: Tensor
    """[rows] in any round."""


def parts_of(
    ids: Tensor, options: AttentionOptions, mask: Tensor | None, size: int, *, slice_len: int = 7
) -> Iterator[HeldPart]:
    """Of each round, the members of a bucket that `window_partition` names. Rows come slice by slice."""
    assert isinstance(options.rule, WindowRule)
    batch, n_heads, n_rounds, seq_len = ids.shape
    buckets = mark_padding(ids, options.n_buckets, mask)
    total = count_buckets(buckets, options.n_buckets)
    rank = torch.stack(
        [bucket_ranks(buckets[:, r], torch.zeros_like(total[:, r])) for r in range(n_rounds)], dim=1
    )
    tile_len = choose_tiling(options.rule, seq_len, options.n_buckets).tile_len
    numbers = options.head_indices(batch, n_heads, ids.device)
    codes = full_position_codes(buckets, options.n_buckets, options.rule) if options.count_pairs_once else None
    own = buckets.long().clamp_max(options.n_buckets - 1)
    is_real = buckets < options.n_buckets
    for index in range(size):
        here, asks = torch.zeros_like(is_real), torch.zeros_like(is_real)
        for r in range(n_rounds):
            run = window_partition(total[:, r], options.rule, tile_len, Partition(index, size))
            start, stop, first, last = (
                x.gather(1, own[:, r]) for x in (run.start, run.stop, run.query_start, run.query_stop)
            )
            here[:, r] = is_real[:, r] & (rank[:, r] >= start) & (rank[:, r] < stop)
            asks[:, r] = is_real[:, r] & (rank[:, r] >= first) & (rank[:, r] < last)
        unit, token = here.any(dim=1).nonzero(as_tuple=True)
        by_slice = (token // slice_len).argsort(stable=True)
        unit, token = unit[by_slice], token[by_slice]
        keys = [
            row_sort_keys(
                unit,
                torch.where(here[unit, r, token], buckets[unit, r, token].long(), options.n_buckets),
                batch * n_heads,
                options.n_buckets,
            )
            for r in range(n_rounds)
        ]
        rows = Rows(
            numbers[unit],
            token,
            codes[:, unit, token].contiguous() if codes is not None and n_rounds > 1 else None,
        )
        held = HeldRows(rows, keys, total, seq_len, Partition(index, size))
        yield HeldPart(held, unit * seq_len + token, asks[unit, :, token].any(dim=1))


def attend_in_parts(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    ids: Tensor,
    options: AttentionOptions,
    mask: Tensor | None,
    d_out: Tensor,
    size: int,
) -> list[Tensor]:
    """Output and gradients of q, (k), v [B, H, S, D]."""
    parts = list(parts_of(ids, options, mask, size))
    width, scratch = v.shape[3], Workspace(v.device)
    flat_q, flat_v, flat_d_out = (x.reshape(-1, width) for x in (q, v, d_out))
    flat_k = None if k is None else k.reshape(-1, width)

    def rows_of(part: HeldPart) -> list[Tensor | None]:
        wide = [None if x is None else x[part.number] for x in (flat_q, flat_k, flat_v)]
        if wide[1] is not None:  # of keys only, the query has not travelled
            wide[0] = wide[0] * part.is_query.unsqueeze(1)
        return wide

    attentions = [attention_of_held(part.held, options, width, v.dtype, scratch) for part in parts]
    found = [attention.attend(*rows_of(part)) for attention, part in zip(attentions, parts, strict=True)]
    lses = torch.full((size, flat_v.shape[0]), -torch.inf, device=v.device)
    for lse, part, (_, part_lse) in zip(lses, parts, found, strict=True):
        assert torch.isinf(part_lse[~part.is_query]).all(), "who is no query meets nobody"
        lse[part.number] = part_lse.masked_fill(torch.isinf(part_lse), -torch.inf)
    lse = lses.logsumexp(dim=0)
    out = torch.zeros(flat_v.shape, device=v.device)
    for part, (o, part_lse) in zip(parts, found, strict=True):
        meets = part_lse.isfinite()
        number = part.number[meets]
        out[number] += o[meets].float() * (part_lse[meets] - lse[number]).exp().unsqueeze(1)
    alone = torch.isinf(lse)
    out[alone] = flat_v[alone].float()

    delta = (out * flat_d_out.float()).sum(dim=1)
    grads = [torch.zeros_like(out) for _ in range(2 if k is None else 3)]
    grads[-1][alone] = flat_d_out[alone].float()
    total = lse.masked_fill(alone, torch.inf)
    for attention, part in zip(attentions, parts, strict=True):
        silent = ~part.is_query | alone[part.number]
        d_rows = flat_d_out[part.number].masked_fill(silent.unsqueeze(1), 0.0)
        part_lse = total[part.number].masked_fill(silent, torch.inf)
        part_delta = delta[part.number].masked_fill(silent, 0.0)
        some = attention.attend_backward(*rows_of(part), d_rows, lse=part_lse, delta=part_delta)
        assert (some[1] is None) == (k is None)
        for grad, of_part in zip(grads, [x for x in some if x is not None], strict=True):
            grad[part.number] += of_part.float()
    return [x.view(v.shape) for x in (out, *grads)]
