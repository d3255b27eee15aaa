"""Attention combined from the partial softmaxes of the shards of a partitioned order, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.lsh import AttentionOptions, WindowRule, sorting
from reformer_dist.ops.lsh.attention import BackwardTensors, ForwardTensors, Shard
from reformer_dist.ops.lsh.backends import backend_for
from reformer_dist.ops.lsh.online_softmax import LOG_2
from reformer_dist.ops.lsh.partition import Partition, choose_tiling, query_owners, window_partition


@dataclass(frozen=True)
class PartitionShard:
    shard: Shard
    row_index: Tensor
    """[L] index of each row in [0, B * H * S)."""
    is_query: Tensor
    """[L] whether the row is a query in any round."""


def partition_shards(
    ids: Tensor,
    options: AttentionOptions,
    mask: Tensor | None,
    size: int,
    query_ids: Tensor | None = None,
    *,
    slice_len: int = 7,
) -> Iterator[PartitionShard]:
    """The shards of `size` partitions of ids [B, H, R, S]; their rows are ordered by slice of the sequence.

    query_ids: like ids, of the queries, if those of the keys are their own.
    """
    assert isinstance(options.rule, WindowRule)
    batch, n_heads, n_rounds, seq_len = ids.shape
    n_buckets = options.n_buckets
    buckets = sorting.mark_padding(ids, n_buckets, mask)
    sizes = sorting.count_buckets(buckets, n_buckets)
    none = torch.zeros_like(sizes[:, 0])
    rank = torch.stack([sorting.indices_in_bucket(buckets[:, r], none) for r in range(n_rounds)], dim=1)
    tile_len = choose_tiling(options.rule, seq_len, n_buckets).tile_len
    head_indices = options.head_indices(batch, n_heads, ids.device)
    has_codes = options.count_pairs_once and n_rounds > 1
    codes = sorting.full_position_codes(buckets, n_buckets, options.rule) if has_codes else None
    real_bucket = buckets.long().clamp_max(n_buckets - 1)
    is_real, documents = buckets < n_buckets, options.document_ids
    query_buckets = owners = query_codes = None
    if query_ids is not None:
        query_buckets = sorting.mark_padding(query_ids, n_buckets, mask).long()
        owners = _owners(query_buckets, buckets, sizes, options.rule, tile_len, size)
        if has_codes:
            query_codes = sorting.full_query_codes(query_buckets, buckets, n_buckets, options.rule)
    for index in range(size):
        is_held, is_query = torch.zeros_like(is_real), torch.zeros_like(is_real)
        for r in range(n_rounds):
            part = window_partition(sizes[:, r], options.rule, tile_len, Partition(index, size))
            start, stop, query_start, query_stop = (
                x.gather(1, real_bucket[:, r]) for x in (part.start, part.stop, part.query_start, part.query_stop)
            )
            is_held[:, r] = is_real[:, r] & (rank[:, r] >= start) & (rank[:, r] < stop)
            is_query[:, r] = is_real[:, r] & (rank[:, r] >= query_start) & (rank[:, r] < query_stop)
        if owners is not None:
            is_query = owners == index
        head, token = (is_held | is_query).any(dim=1).nonzero(as_tuple=True)
        by_slice = (token // slice_len).argsort(stable=True)
        head, token = head[by_slice], token[by_slice]

        def sort_keys(buckets: Tensor, is_here: Tensor, head: Tensor = head, token: Tensor = token) -> Tensor:
            here = torch.where(is_here, buckets.long(), n_buckets)[head, :, token]
            by_round = (sorting.row_sort_keys(head, ids, batch * n_heads, n_buckets) for ids in here.unbind(1))
            return torch.stack(list(by_round)).unsqueeze(0)

        shard = Shard(
            sort_keys(buckets, is_held),
            batch * n_heads * n_buckets,
            head_indices[head],
            seq_len,
            query_sort_keys=None if query_buckets is None else sort_keys(query_buckets, is_query),
            query_codes=None if query_codes is None else query_codes[:, head, token].contiguous(),
            positions=token,
            position_codes=None if codes is None else codes[:, head, token].contiguous(),
            bucket_sizes=sizes,
            partition=Partition(index, size),
            document_ids=None if documents is None else documents[head // n_heads, token].int().unsqueeze(0),
        )
        yield PartitionShard(shard, head * seq_len + token, is_query[head, :, token].any(dim=1))


def _owners(
    query_buckets: Tensor, buckets: Tensor, sizes: Tensor, rule: WindowRule, tile_len: int, size: int
) -> Tensor:
    """The partition that attends each query, [BH, R, S]."""
    owners = []
    for r in range(buckets.shape[1]):
        query, key, total = query_buckets[:, r], buckets[:, r], sizes[:, r]
        last_key = sorting.last_key_ranks(query, key, torch.zeros_like(total), includes_own=rule.sees_self)
        owners.append(query_owners(query, last_key, total, rule, tile_len, size))
    return torch.stack(owners, dim=1)


def attend_by_partition(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    ids: Tensor,
    options: AttentionOptions,
    mask: Tensor | None,
    d_out: Tensor,
    size: int,
    query_ids: Tensor | None = None,
) -> list[Tensor]:
    """Output and gradients of q, (k), v [B, H, S, D], in float32."""
    parts = list(partition_shards(ids, options, mask, size, query_ids))
    flat_q, flat_v, flat_d_out = (x.reshape(-1, x.shape[3]) for x in (q, v, d_out))
    flat_k = None if k is None else k.reshape(-1, k.shape[3])
    backend = backend_for(options, v, partitioned=True)(options, v)
    # the others can write float32, so that only the caller rounds
    dtype = v.dtype if options.backend == "triton" else torch.float32
    sorted_shards = [backend.sort(part.shard) for part in parts]

    def as_one_head(x: Tensor) -> Tensor:
        return x.contiguous().view(1, 1, *x.shape)

    def inputs_of(part: PartitionShard) -> tuple[Tensor, Tensor | None, Tensor]:
        part_q, part_v = flat_q[part.row_index], flat_v[part.row_index]
        if flat_k is None:
            return as_one_head(part_q), None, as_one_head(part_v)
        # an exchange does not send the separate queries of rows that are keys only
        part_q = part_q * part.is_query.unsqueeze(1)
        return as_one_head(part_q), as_one_head(flat_k[part.row_index]), as_one_head(part_v)

    lses = torch.full((size, flat_v.shape[0]), -torch.inf, device=v.device)
    partials = []
    for sorted_shard, part, part_lses in zip(sorted_shards, parts, lses, strict=True):
        inputs = inputs_of(part)
        o = torch.empty(inputs[2].shape, dtype=dtype, device=v.device)
        lse = torch.empty(inputs[2].shape[:3], device=v.device)
        sorted_shard.attend(ForwardTensors(*inputs, o, lse))
        o, lse = o[0, 0], lse[0, 0]
        assert torch.isinf(lse[~part.is_query]).all(), "a row that is not a query attended to a key"
        part_lses[part.row_index] = lse.masked_fill(torch.isinf(lse), -torch.inf)
        partials.append((o, lse))
    total_lse = lses.mul(LOG_2).logsumexp(dim=0) / LOG_2
    out = torch.zeros(flat_v.shape, device=v.device)
    for part, (o, lse) in zip(parts, partials, strict=True):
        has_keys = lse.isfinite()
        index = part.row_index[has_keys]
        out[index] += o[has_keys].float() * (lse[has_keys] - total_lse[index]).exp2().unsqueeze(1)
    met_no_key = torch.isinf(total_lse)
    if options.attends_alone:
        out[met_no_key] = flat_v[met_no_key].float()

    delta = (out * flat_d_out.float()).sum(dim=1)
    grads = [torch.zeros_like(out) for _ in range(2 if k is None else 3)]
    if options.attends_alone:
        grads[-1][met_no_key] = flat_d_out[met_no_key].float()
    total_lse = total_lse.masked_fill(met_no_key, torch.inf)
    for sorted_shard, part in zip(sorted_shards, parts, strict=True):
        inputs = inputs_of(part)
        is_excluded = ~part.is_query | met_no_key[part.row_index]
        query_rows = [
            as_one_head(flat_d_out[part.row_index].masked_fill(is_excluded.unsqueeze(1), 0.0)),
            as_one_head(total_lse[part.row_index].masked_fill(is_excluded, torch.inf)),
            as_one_head(delta[part.row_index].masked_fill(is_excluded, 0.0)),
        ]
        part_grads = [None if x is None else torch.zeros_like(x, dtype=dtype) for x in inputs]
        sorted_shard.attend_backward(BackwardTensors(*inputs, *query_rows, *part_grads))
        for grad, part_grad in zip(grads, [x for x in part_grads if x is not None], strict=True):
            grad[part.row_index] += part_grad[0, 0].float()
    return [x.view(v.shape) for x in (out, *grads)]
