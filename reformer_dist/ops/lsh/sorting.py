"""Where tokens stand in a round's order by (bucket, position): ranks in buckets, and codes for nearness."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reformer_dist.ops.lsh.options import ChunkRule, Rule


def mark_padding(bucket_ids: Tensor, n_buckets: int, key_padding_mask: Tensor | None) -> Tensor:
    """[U, R, S] of bucket ids [B, H, R, S], with n_buckets in place of the ids of padding (mask False)."""
    units = bucket_ids.flatten(0, 1)
    if key_padding_mask is None:
        return units
    padding = (~key_padding_mask).repeat_interleave(bucket_ids.shape[1], dim=0).unsqueeze(1)
    return units.masked_fill(padding, n_buckets)


def count_buckets(buckets: Tensor, n_buckets: int) -> Tensor:
    """Tokens of each bucket, int32 [U, R, K], of ids [U, R, S]; padding is not counted."""
    n_units, n_rounds, _ = buckets.shape
    counts = torch.zeros(n_units, n_rounds, n_buckets + 1, dtype=torch.int32, device=buckets.device)
    for round_ in range(n_rounds):
        index = buckets[:, round_].long()
        counts[:, round_].scatter_add_(1, index, torch.ones_like(index, dtype=torch.int32))
    return counts[..., :n_buckets].contiguous()


def row_sort_keys(unit: Tensor, bucket: Tensor, n_units: int, n_buckets: int) -> Tensor:
    """What rows are sorted by, int64 [n_rows]: (unit, bucket); absent rows (bucket = n_buckets) come last."""
    key = unit * n_buckets + bucket.long()
    return key.masked_fill_(bucket == n_buckets, n_units * n_buckets)


DIGIT = 16  # bits: NumPy sorts such integers by their digits, far faster than wider ones by comparing them


def radix_argsort(keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The stable ascending order of non-negative keys [n], digit by digit."""
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    for shift in range(DIGIT, int(keys.max(initial=0)).bit_length(), DIGIT):
        order = order[np.argsort((keys[order] >> shift).astype(np.uint16), kind="stable")]
    return order


def stable_argsort(keys: Tensor) -> Tensor:
    """`radix_argsort` of keys [n] below 2^31, int64: a GPU sorts for itself, and its host does not wait."""
    if keys.is_cuda:
        return keys.int().argsort(stable=True)
    return torch.from_numpy(radix_argsort(keys.numpy()))


def bucket_ranks(bucket: Tensor, before: Tensor) -> Tensor:
    """Rank in its bucket of each token of one round, int64 [U, S], from ids [U, S].

    before [U, K]: members that stand before all of these tokens (on the ranks before).
    """
    n_units, seq_len = bucket.shape
    n_buckets = before.shape[1]
    unit = torch.arange(n_units, device=bucket.device).unsqueeze(1) * (n_buckets + 1)
    keys = (bucket.long() + unit).flatten()
    order = stable_argsort(keys)
    sorted_keys = keys[order]
    counts = torch.bincount(sorted_keys, minlength=n_units * (n_buckets + 1))
    shift = torch.nn.functional.pad(before.long(), (0, 1)).flatten() - (counts.cumsum(0) - counts)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device) + shift[sorted_keys]
    return rank.view(n_units, seq_len)


def position_codes(bucket: Tensor, rank: Tensor, total: Tensor, rule: Rule) -> Tensor:
    """int32 [U, S] numbers of one round by which two tokens of a unit can be told to be near, see `within_reach`.

    bucket [U, S], rank in it [U, S], members of each bucket [U, K]. Window rule: places in an order in which
    buckets lie a window apart; chunk rule: the number of the chunk. Those of padding mean nothing.
    """
    gap = 0 if isinstance(rule, ChunkRule) else rule.window
    spread = total.long() + gap
    own = bucket.long().clamp_max(total.shape[1] - 1)
    place = (spread.cumsum(dim=1) - spread).gather(1, own) + rank
    if isinstance(rule, ChunkRule):
        place = place // rule.chunk_len
    return place.to(torch.int32)


def full_position_codes(buckets: Tensor, n_buckets: int, rule: Rule) -> Tensor:
    """int32 [R, U, S]: the place codes of all rounds of whole units, from ids [U, R, S]."""
    total = count_buckets(buckets, n_buckets)
    codes = []
    for round_ in range(buckets.shape[1]):
        bucket = buckets[:, round_]
        rank = bucket_ranks(bucket, torch.zeros_like(total[:, round_]))
        codes.append(position_codes(bucket, rank, total[:, round_], rule))
    return torch.stack(codes)


def within_reach(query_codes: Tensor, key_codes: Tensor, rule: Rule) -> Tensor:
    """Whether a query meets a key in the round of the codes, were both real and not one token; broadcasts."""
    distance = query_codes - key_codes
    if isinstance(rule, ChunkRule):
        return (distance <= rule.n_before) & (distance >= -rule.n_after)
    return (distance >= 0) & (distance < rule.window) if rule.causal else distance.abs() < rule.window
