"""Is the hashing in good health? Three numbers that tell balance, coverage and agreement of the rounds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BucketStats:
    largest_over_mean: float
    """Tokens of the largest bucket over the mean bucket: 1 is perfect balance."""
    full_windows: float
    """Share of (token, round) whose bucket holds at least `window` members up to the token itself."""
    agreement: float
    """Of tokens that are neighbours in one round, the share that another round puts into one bucket too."""


def measure_bucket_stats(bucket_ids: Tensor, counts: Tensor, window: int) -> BucketStats:
    """Health of bucket ids [B, H, R, S] whose buckets have `counts` [B * H, R, K] members.

    The counts may be those of longer sequences of which the ids are slices; agreement is that of the ids
    themselves, and 1 where there is only one round.
    """
    n_hashes, seq_len = bucket_ids.shape[2:]
    n_tokens = max(1, int(counts[0, 0].sum()))
    largest = counts.amax(dim=2).float().mean().item() * counts.shape[2] / n_tokens
    # the first window - 1 members of each bucket have no full window
    full = (counts - (window - 1)).clamp_min(0).sum().item() / (counts.shape[0] * n_hashes * n_tokens)
    ids = bucket_ids.reshape(-1, n_hashes, seq_len).long()
    agreeing, neighbours = 0.0, 0
    for r in range(n_hashes):
        order = ids[:, r].argsort(dim=1, stable=True)
        in_order = ids.gather(2, order.unsqueeze(1).expand_as(ids))
        same = in_order[:, :, 1:] == in_order[:, :, :-1]
        is_neighbour = same[:, r]
        neighbours += int(is_neighbour.sum().item()) * (n_hashes - 1)
        agreeing += (same & is_neighbour.unsqueeze(1)).sum().item() - is_neighbour.sum().item()
    agreement = agreeing / neighbours if neighbours else 1.0
    return BucketStats(largest, full, agreement)
