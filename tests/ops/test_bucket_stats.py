"""Rotary positions are relative, and the health numbers of constructed bucket ids are known beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reformer_dist.ops.lsh.bucket_stats import BucketStats, measure_bucket_stats
from reformer_dist.ops.lsh.sorting import count_buckets
from reformer_dist.ops.rotary import rotary_tables, rotate


def turned(x: Tensor, position: int) -> Tensor:
    return rotate(x, *rotary_tables(torch.tensor([position]), x.shape[-1]))


@pytest.mark.parametrize("head_dim", [2, 6, 64])
def test_products_depend_on_the_distance_alone(head_dim: int) -> None:
    q, k = torch.randn(2, 1, 1, 1, head_dim, generator=torch.Generator().manual_seed(0))
    near, far = ((turned(q, m) * turned(k, n)).sum() for m, n in ((7, 3), (107, 103)))
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(near, (turned(q, 9) * turned(k, 3)).sum(), atol=1e-3)


def test_rotation_keeps_lengths_and_leaves_position_zero() -> None:
    x = torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(0))
    out = rotate(x, *rotary_tables(torch.arange(50), 8))
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(out[:, :, 0], x[:, :, 0]) and not torch.allclose(out[:, :, 1], x[:, :, 1])


def test_rotation_in_bf16_is_that_in_float32_rounded() -> None:
    x = torch.randn(1, 1, 50, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    tables = rotary_tables(torch.arange(50), 8)
    assert torch.equal(rotate(x, *tables), rotate(x.float(), *tables).bfloat16())


def ids_of(*rounds: Tensor) -> Tensor:
    return torch.stack(list(rounds)).to(torch.uint8).expand(2, 3, len(rounds), -1)


def health_of(ids: Tensor, n_buckets: int, window: int) -> BucketStats:
    return measure_bucket_stats(ids, count_buckets(ids.flatten(0, 1), n_buckets), window)


def test_health_of_perfect_balance() -> None:
    in_turn = torch.arange(64) % 4
    health = health_of(ids_of(in_turn), n_buckets=4, window=3)
    assert health.largest_over_mean == 1 and health.agreement == 1
    # of 16 members of a bucket, all but the first two
    assert health.full_windows == 14 / 16


def test_health_of_a_collapse() -> None:
    health = health_of(ids_of(torch.zeros(64), torch.zeros(64)), n_buckets=4, window=5)
    assert (health.largest_over_mean, health.full_windows, health.agreement) == (4, 60 / 64, 1)


def test_health_of_windows_that_never_fill() -> None:
    assert health_of(ids_of(torch.arange(64) % 16), n_buckets=16, window=5).full_windows == 0


def test_agreement() -> None:
    first, within = torch.arange(64) // 16, torch.arange(64) % 16
    same = health_of(ids_of(first, first, first), n_buckets=16, window=1)
    opposed = health_of(ids_of(first, within), n_buckets=16, window=1)
    # 15 neighbours in each of 4 buckets, all parted by `within`, and 3 in each of its 16, all parted by `first`
    assert (same.agreement, opposed.agreement) == (1, 0)
    halves = torch.arange(64) // 8
    # a neighbour in `first` is one in `halves` but at the middle of a bucket; the other way round always
    mixed = health_of(ids_of(first, halves), n_buckets=16, window=1)
    assert mixed.agreement == pytest.approx((4 * 14 + 8 * 7) / (4 * 15 + 8 * 7))
