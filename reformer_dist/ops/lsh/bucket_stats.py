"""Statistics of a hashing: balance of the buckets, full windows and agreement between rounds."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from reformer_dist.ops.checks import TensorChecks, check_integer


@dataclass(frozen=True)
class BucketStats:
    largest_over_mean: float
    """Tokens in the largest bucket over the mean bucket, averaged over heads and rounds: 1 is perfect balance."""
    full_windows: float
    """Fraction of (token, round) pairs whose bucket holds at least `window` members up to and including it."""
    agreement: float
    """Of pairs of neighbours in the order of a bucket, the fraction that share a bucket in another round."""
    sizes_over_mean: Tensor = field(repr=False, compare=False)
    """[BH * R * K] tokens of each bucket over those of the mean bucket."""


def measure_bucket_stats(bucket_ids: Tensor, counts: Tensor, window: int) -> BucketStats:
    """Statistics of bucket ids [B, H, R, S] whose buckets have `counts` [B * H, R, K] members.

    The counts may be those of longer sequences of which the ids are slices. Agreement is computed from the ids
    alone, and is 1 for a single round. Raises ValueError.
    """
    TensorChecks().integers("bucket_ids", bucket_ids, "B H R S")
    checks = TensorChecks(BH=bucket_ids.shape[0] * bucket_ids.shape[1])
    checks.integers("bucket_ids", bucket_ids, "B H R S")
    checks.integers("counts", counts, "BH R K")
    check_integer("window", window, least=1)
    n_hashes, seq_len = bucket_ids.shape[2:]
    n_tokens = max(1, int(counts[0, 0].sum()))
    largest = counts.amax(dim=2).float().mean().item() * counts.shape[2] / n_tokens
    # the first window - 1 members of each bucket have no full window
    full = (counts - (window - 1)).clamp_min(0).sum().item() / (counts.shape[0] * n_hashes * n_tokens)
    ids = bucket_ids.reshape(-1, n_hashes, seq_len).long()
    n_agreeing, n_adjacent = 0.0, 0
    for r in range(n_hashes):
        order = ids[:, r].argsort(dim=1, stable=True)
        sorted_ids = ids.gather(2, order.unsqueeze(1).expand_as(ids))
        same_bucket = sorted_ids[:, :, 1:] == sorted_ids[:, :, :-1]
        is_adjacent = same_bucket[:, r]
        n_adjacent += int(is_adjacent.sum().item()) * (n_hashes - 1)
        n_agreeing += (same_bucket & is_adjacent.unsqueeze(1)).sum().item() - is_adjacent.sum().item()
    agreement = n_agreeing / n_adjacent if n_adjacent else 1.0
    sizes = counts.flatten().float() * (counts.shape[2] / n_tokens)
    return BucketStats(largest, full, agreement, sizes)
