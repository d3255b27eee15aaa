"""Is the hashing in good health? Three numbers that tell balance, coverage and agreement of the rounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LSHHealth:
    largest_over_mean: float
    """Tokens of the largest bucket over the mean bucket: 1 is perfect balance."""
    full_windows: float
    """Share of (token, round) whose bucket holds at least `window` members up to the token itself."""
    agreement: float
    """Of tokens that are neighbours in one round, the share that another round puts into one bucket too."""


def measure_health(bucket_ids: Tensor, n_buckets: int, window: int) -> LSHHealth:
    """Health of bucket ids [B, H, R, S]. Agreement is 1 where there is only one round."""
    n_hashes, seq_len = bucket_ids.shape[2:]
    ids = bucket_ids.reshape(-1, n_hashes, seq_len).long()
    row = torch.arange(ids.shape[0], device=ids.device).view(-1, 1) * n_buckets
    largest, full, agreeing, neighbours = 0.0, 0.0, 0.0, 0
    for r in range(n_hashes):
        counts = torch.bincount((ids[:, r] + row).flatten(), minlength=ids.shape[0] * n_buckets)
        largest += counts.view(-1, n_buckets).max(1).values.float().mean().item() * n_buckets / seq_len
        # the first window - 1 members of each bucket have no full window
        full += (counts - (window - 1)).clamp_min(0).sum().item() / (ids.shape[0] * seq_len)
        order = ids[:, r].argsort(dim=1, stable=True)
        in_order = ids.gather(2, order.unsqueeze(1).expand_as(ids))
        same = in_order[:, :, 1:] == in_order[:, :, :-1]
        is_neighbour = same[:, r]
        neighbours += int(is_neighbour.sum().item()) * (n_hashes - 1)
        agreeing += (same & is_neighbour.unsqueeze(1)).sum().item() - is_neighbour.sum().item()
    agreement = agreeing / neighbours if neighbours else 1.0
    return LSHHealth(largest / n_hashes, full / n_hashes, agreement)
