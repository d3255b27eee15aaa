"""The order of a round's tokens by (bucket, position): sort keys, indices within buckets and position codes.

BH: (batch row, head) pairs, flattened: head index = batch row * n_heads + head.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reformer_dist.ops.lsh.neighbour_rules import ChunkRule, Rule, WindowRule


def mark_padding(bucket_ids: Tensor, n_buckets: int, key_padding_mask: Tensor | None) -> Tensor:
    """[BH, R, S] from bucket ids [B, H, R, S], with the ids of padding (mask False) replaced by n_buckets."""
    buckets = bucket_ids.flatten(0, 1)
    if key_padding_mask is None:
        return buckets
    padding = (~key_padding_mask).repeat_interleave(bucket_ids.shape[1], dim=0).unsqueeze(1)
    return buckets.masked_fill(padding, n_buckets)


def count_buckets(buckets: Tensor, n_buckets: int) -> Tensor:
    """Bucket sizes, int32 [BH, R, K], from ids [BH, R, S]; padding is not counted."""
    n_heads, n_rounds, _ = buckets.shape
    counts = torch.zeros(n_heads, n_rounds, n_buckets + 1, dtype=torch.int32, device=buckets.device)
    for round_ in range(n_rounds):
        index = buckets[:, round_].long()
        counts[:, round_].scatter_add_(1, index, torch.ones_like(index, dtype=torch.int32))
    return counts[..., :n_buckets].contiguous()


def row_sort_keys(head_index: Tensor, bucket: Tensor, n_heads: int, n_buckets: int) -> Tensor:
    """Sort keys of rows by (head index, bucket), int64 [n_rows]; absent rows (bucket = n_buckets) sort last."""
    key = head_index * n_buckets + bucket.long()
    return key.masked_fill_(bucket == n_buckets, n_heads * n_buckets)


DIGIT_BITS = 16  # NumPy radix-sorts integers of this width, far faster than it compares wider ones


def radix_argsort(keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Stable ascending argsort of non-negative keys [n], digit by digit."""
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    for shift in range(DIGIT_BITS, int(keys.max(initial=0)).bit_length(), DIGIT_BITS):
        order = order[np.argsort((keys[order] >> shift).astype(np.uint16), kind="stable")]
    return order


def stable_argsort(keys: Tensor) -> Tensor:
    """int64 argsort of keys [n] in [0, 2^31), on the device of the keys: no host sync on a GPU."""
    if keys.is_cuda:
        return keys.int().argsort(stable=True)
    return torch.from_numpy(radix_argsort(keys.numpy()))


def indices_in_bucket(bucket: Tensor, before: Tensor) -> Tensor:
    """Rank of each token within its bucket in one round, int64 [BH, S], from ids [BH, S].

    before [BH, K]: members of each bucket that precede all of these tokens (those on earlier ranks).
    """
    n_heads, seq_len = bucket.shape
    n_buckets = before.shape[1]
    head_offset = torch.arange(n_heads, device=bucket.device).unsqueeze(1) * (n_buckets + 1)
    keys = (bucket.long() + head_offset).flatten()
    order = stable_argsort(keys)
    sorted_keys = keys[order]
    counts = torch.bincount(sorted_keys, minlength=n_heads * (n_buckets + 1))
    shift = torch.nn.functional.pad(before.long(), (0, 1)).flatten() - (counts.cumsum(0) - counts)
    index = torch.empty_like(order)
    index[order] = torch.arange(order.numel(), device=order.device) + shift[sorted_keys]
    return index.view(n_heads, seq_len)


def last_key_ranks(query_bucket: Tensor, key_bucket: Tensor, before: Tensor, *, includes_own: bool) -> Tensor:
    """Rank within its bucket of the last key up to each query in one round, -1 if there is none: int64 [BH, S].

    query_bucket, key_bucket [BH, S]; before [BH, K]: keys of each bucket that precede all of these tokens.
    includes_own: keys at the query's own position count. Undefined for padding.
    """
    n_heads, seq_len = key_bucket.shape
    n_ids = before.shape[1] + 1
    # queries and keys in one order by (bucket, position)
    pair = (key_bucket, query_bucket) if includes_own else (query_bucket, key_bucket)
    head_offset = torch.arange(n_heads, device=key_bucket.device).view(-1, 1, 1) * n_ids
    ids = (torch.stack(pair, dim=2).long() + head_offset).flatten()
    order = stable_argsort(ids)
    is_key = (order % 2 == 0) == includes_own
    sorted_ids = ids[order]
    counts = torch.bincount(sorted_ids[is_key], minlength=n_heads * n_ids)
    shift = torch.nn.functional.pad(before.long(), (0, 1)).flatten() - (counts.cumsum(0) - counts)
    ranks = torch.empty_like(order)
    ranks[order] = is_key.cumsum(0) - 1 + shift[sorted_ids]
    return ranks.view(n_heads, seq_len, 2)[..., int(includes_own)]


def position_codes(bucket: Tensor, index: Tensor, total: Tensor, rule: Rule) -> Tensor:
    """Codes of one round, int32 [BH, S], from which `within_reach` computes whether a query sees a key.

    bucket [BH, S], index within it [BH, S], size of each bucket [BH, K]. Window rule: the sorted position, with a
    gap of one window between buckets. Chunk rule: the chunk index. The codes of padding are undefined. Of queries
    with keys of their own, index: `last_key_ranks`, total: of the keys.
    """
    gap = 0 if isinstance(rule, ChunkRule) else rule.window
    spread = total.long() + gap
    real_bucket = bucket.long().clamp_max(total.shape[1] - 1)
    code = (spread.cumsum(dim=1) - spread).gather(1, real_bucket) + index
    if isinstance(rule, ChunkRule):
        code = code // rule.chunk_len
    return code.to(torch.int32)


def full_position_codes(buckets: Tensor, n_buckets: int, rule: Rule) -> Tensor:
    """Position codes of all rounds of unsharded sequences, int32 [R, BH, S], from ids [BH, R, S]."""
    total = count_buckets(buckets, n_buckets)
    codes = []
    for round_ in range(buckets.shape[1]):
        bucket = buckets[:, round_]
        index = indices_in_bucket(bucket, torch.zeros_like(total[:, round_]))
        codes.append(position_codes(bucket, index, total[:, round_], rule))
    return torch.stack(codes)


def full_query_codes(query_buckets: Tensor, key_buckets: Tensor, n_buckets: int, rule: WindowRule) -> Tensor:
    """As `full_position_codes`, of queries whose keys have buckets of their own; ids [BH, R, S]."""
    total = count_buckets(key_buckets, n_buckets)
    codes = []
    for round_ in range(key_buckets.shape[1]):
        bucket, no_earlier = query_buckets[:, round_], torch.zeros_like(total[:, round_])
        ranks = last_key_ranks(bucket, key_buckets[:, round_], no_earlier, includes_own=rule.sees_self)
        codes.append(position_codes(bucket, ranks, total[:, round_], rule))
    return torch.stack(codes)
