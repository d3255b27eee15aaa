"""Bucket statistics of constructed bucket ids, whose values are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reformer_dist.ops.lsh.bucket_stats import BucketStats, measure_bucket_stats
from reformer_dist.ops.lsh.sorting import count_buckets


def make_ids(*rounds: Tensor) -> Tensor:
    return torch.stack(list(rounds)).to(torch.uint8).expand(2, 3, len(rounds), -1)


def measure(ids: Tensor, n_buckets: int, window: int) -> BucketStats:
    return measure_bucket_stats(ids, count_buckets(ids.flatten(0, 1), n_buckets), window)


def test_perfect_balance() -> None:
    stats = measure(make_ids(torch.arange(64) % 4), n_buckets=4, window=3)
    assert stats.largest_over_mean == 1 and stats.agreement == 1
    # of the 16 members of a bucket, all but the first two
    assert stats.full_windows == 14 / 16


def test_collapse_into_one_bucket() -> None:
    stats = measure(make_ids(torch.zeros(64), torch.zeros(64)), n_buckets=4, window=5)
    assert (stats.largest_over_mean, stats.full_windows, stats.agreement) == (4, 60 / 64, 1)


def test_windows_that_never_fill() -> None:
    assert measure(make_ids(torch.arange(64) % 16), n_buckets=16, window=5).full_windows == 0


def test_agreement() -> None:
    first, within = torch.arange(64) // 16, torch.arange(64) % 16
    same = measure(make_ids(first, first, first), n_buckets=16, window=1)
    opposed = measure(make_ids(first, within), n_buckets=16, window=1)
    # 15 adjacent pairs in each of the 4 buckets, all separated by `within`; 3 in each of its 16, all by `first`
    assert (same.agreement, opposed.agreement) == (1, 0)
    halves = torch.arange(64) // 8
    # pairs adjacent in `first` are so in `halves`, except in the middle of a bucket; the converse always holds
    mixed = measure(make_ids(first, halves), n_buckets=16, window=1)
    assert mixed.agreement == pytest.approx((4 * 14 + 8 * 7) / (4 * 15 + 8 * 7))
