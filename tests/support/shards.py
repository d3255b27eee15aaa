"""Whole attention combined from the partial softmaxes of the shards of several partitions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.lsh import AttentionOptions, WindowRule
from reformer_dist.ops.lsh.attention import BackwardTensors, ForwardTensors, Shard
from reformer_dist.ops.lsh.backends import backend_for
from reformer_dist.ops.lsh.online_softmax import LOG_2
from reformer_dist.ops.lsh.partition import Partition, choose_tiling, window_partition
from reformer_dist.ops.lsh.sorting import (
    bucket_ranks,
    count_buckets,
    full_position_codes,
    mark_padding,
    row_sort_keys,
)


@dataclass(frozen=True)
class PartitionShard:
    shard: Shard
    number: Tensor
    """[rows] of each row in [B * H * S]."""
    is_query: Tensor
    """[rows] in any round."""


def partition_shards(
    ids: Tensor, options: AttentionOptions, mask: Tensor | None, size: int, *, slice_len: int = 7
) -> Iterator[PartitionShard]:
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
        shard = Shard(
            torch.stack(keys).unsqueeze(0),
            batch * n_heads * options.n_buckets,
            numbers[unit],
            seq_len,
            positions=token,
            position_codes=codes[:, unit, token].contiguous() if codes is not None and n_rounds > 1 else None,
            bucket_sizes=total,
            partition=Partition(index, size),
        )
        yield PartitionShard(shard, unit * seq_len + token, asks[unit, :, token].any(dim=1))


def attend_by_partition(
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
    parts = list(partition_shards(ids, options, mask, size))
    width = v.shape[3]
    flat_q, flat_v, flat_d_out = (x.reshape(-1, width) for x in (q, v, d_out))
    flat_k = None if k is None else k.reshape(-1, width)
    backend = backend_for(options, v, partitioned=True)(options, v)
    # the others compute in float32: nothing is to be rounded but by the caller
    dtype = v.dtype if options.backend == "triton" else torch.float32
    orders = [backend.sort(part.shard) for part in parts]

    def as_heads(x: Tensor) -> Tensor:
        return x.contiguous().view(1, 1, *x.shape)

    def rows_of(part: PartitionShard) -> tuple[Tensor, Tensor | None, Tensor]:
        own_q, own_k, own_v = (None if x is None else x[part.number] for x in (flat_q, flat_k, flat_v))
        if own_k is not None:  # queries of rows that are keys only are not sent
            own_q, own_k = own_q * part.is_query.unsqueeze(1), as_heads(own_k)
        return as_heads(own_q), own_k, as_heads(own_v)

    lses = torch.full((size, flat_v.shape[0]), -torch.inf, device=v.device)
    partial = []
    for order, part, part_lses in zip(orders, parts, lses, strict=True):
        rows = rows_of(part)
        o = torch.empty(rows[2].shape, dtype=dtype, device=v.device)
        lse = torch.empty(rows[2].shape[:3], device=v.device)
        order.attend(ForwardTensors(*rows, o, lse))
        o, lse = o[0, 0], lse[0, 0]
        assert torch.isinf(lse[~part.is_query]).all(), "a row that is no query met a key"
        part_lses[part.number] = lse.masked_fill(torch.isinf(lse), -torch.inf)
        partial.append((o, lse))
    total = lses.mul(LOG_2).logsumexp(dim=0) / LOG_2
    out = torch.zeros(flat_v.shape, device=v.device)
    for part, (o, lse) in zip(parts, partial, strict=True):
        meets = lse.isfinite()
        number = part.number[meets]
        out[number] += o[meets].float() * (lse[meets] - total[number]).exp2().unsqueeze(1)
    alone = torch.isinf(total)
    out[alone] = flat_v[alone].float()

    delta = (out * flat_d_out.float()).sum(dim=1)
    grads = [torch.zeros_like(out) for _ in range(2 if k is None else 3)]
    grads[-1][alone] = flat_d_out[alone].float()
    total = total.masked_fill(alone, torch.inf)
    for order, part in zip(orders, parts, strict=True):
        rows = rows_of(part)
        silent = ~part.is_query | alone[part.number]
        of_rows = [
            as_heads(x)
            for x in (
                flat_d_out[part.number].masked_fill(silent.unsqueeze(1), 0.0),
                total[part.number].masked_fill(silent, torch.inf),
                delta[part.number].masked_fill(silent, 0.0),
            )
        ]
        found = [None if x is None else torch.zeros_like(x, dtype=dtype) for x in rows]
        order.attend_backward(BackwardTensors(*rows, *of_rows, *found))
        for grad, of_part in zip(grads, [x for x in found if x is not None], strict=True):
            grad[part.number] += of_part[0, 0].float()
    return [x.view(v.shape) for x in (out, *grads)]
