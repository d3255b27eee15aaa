"""Bucket ids: in range, balanced over factors, a function of direction and seed only, locality-sensitive."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from reformer_dist.ops.lsh import draw_rotations, hash_vectors
from reformer_dist.ops.lsh.hashing import LARGEST_FACTOR, bucket_dtype, bucket_factors, draw_rotations_ahead

SCHEMES = ["rotation", "floor"]


def hashed(x: Tensor, n_buckets: int, scheme: str, n_hashes: int = 4, seed: int = 0) -> Tensor:
    rotations = draw_rotations(x.shape[1], x.shape[3], n_hashes, n_buckets, scheme, seed)
    return hash_vectors(x, rotations, n_buckets, scheme)


def random_vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("n_buckets", [1, 2, 4, 6, 8, 64, 96, 134, 256, 1024, 4096, 33000])
def test_ids_are_in_range(scheme: str, n_buckets: int) -> None:
    ids = hashed(random_vectors(2, 3, 400, 16), n_buckets, scheme)
    assert ids.shape == (2, 3, 4, 400) and ids.dtype == bucket_dtype(n_buckets)
    assert int(ids.min()) >= 0 and int(ids.max()) < n_buckets
    # a few hundred tokens per head and round fill all of a few buckets
    if n_buckets <= 4:
        assert all(row.unique().numel() == n_buckets for row in ids.flatten(0, 2).unbind())


@pytest.mark.parametrize("n_buckets", [255, 256, 2**15 - 1, 2**15])
def test_id_type_holds_the_padding_mark(n_buckets: int) -> None:
    assert torch.iinfo(bucket_dtype(n_buckets)).max >= n_buckets


@pytest.mark.parametrize("largest", sorted(LARGEST_FACTOR.values()))
def test_factors_are_even_multiply_and_balance(largest: int) -> None:
    for n_buckets in [*range(2, 700, 2), 1024, 2048, 4096, 2**16, 2 * 3 * 4 * 5 * 6 * 8]:
        factors = bucket_factors(n_buckets, largest)
        assert math.prod(factors) == n_buckets and all(f % 2 == 0 for f in factors)
        if n_buckets <= largest:
            assert factors == (n_buckets,)
        if n_buckets & (n_buckets - 1) == 0:
            assert max(factors) <= largest and max(factors) <= 2 * min(factors)


def test_factors_have_the_smallest_maximum() -> None:
    for n_buckets in range(2, 400, 2):
        factors = bucket_factors(n_buckets, 8)
        even = [f for f in range(2, n_buckets + 1, 2) if n_buckets % f == 0]
        products = itertools.combinations_with_replacement(even, len(factors))
        assert max(factors) == min(max(p) for p in products if math.prod(p) == n_buckets)


def test_twice_a_prime_is_one_factor() -> None:
    assert bucket_factors(2 * 67, 64) == (134,)


def test_odd_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="n_buckets=7"):
        bucket_factors(7, 64)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("n_buckets", [8, 256])
def test_ids_depend_on_the_direction_only(scheme: str, n_buckets: int) -> None:
    x = random_vectors(1, 2, 300, 16)
    ids = hashed(x, n_buckets, scheme)
    same = torch.cat([x, x.flip(2)], dim=2)
    assert torch.equal(hashed(same, n_buckets, scheme), torch.cat([ids, ids.flip(3)], dim=3))
    for factor in (2.0**-7, 2.0, 1024.0):  # exact, so that no tie flips
        assert torch.equal(hashed(factor * x, n_buckets, scheme), ids)


def test_opposite_vectors_get_opposite_buckets() -> None:
    x = random_vectors(1, 2, 300, 16)
    ids, opposite = hashed(x, 8, "rotation").long(), hashed(-x, 8, "rotation").long()
    assert torch.equal((ids + 4) % 8, opposite)


def test_rotations_drawn_ahead_are_those_of_the_next_call() -> None:
    sizes = (3, 8, 4, 64, "rotation")
    ahead = draw_rotations_ahead(*sizes, 1234, factors=None).result()
    assert draw_rotations(*sizes, 1234, factors=None) is ahead
    with torch.inference_mode():
        assert not draw_rotations_ahead(*sizes, 1235).result().is_inference()
    assert torch.equal(ahead, draw_rotations.__wrapped__(*sizes, 1234))  # type: ignore[attr-defined]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rotations_are_a_function_of_the_seed(scheme: str) -> None:
    state = torch.random.get_rng_state()
    first = draw_rotations(3, 8, 4, 64, scheme, seed=11)
    assert torch.equal(first, draw_rotations(3, 8, 4, 64, scheme, seed=11))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first, draw_rotations(3, 8, 4, 64, scheme, seed=12))
    draws = list(first.flatten(0, 1))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(draws, 2))
    torch.testing.assert_close(first.std(), torch.tensor(1.0), atol=0.15, rtol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_near_vectors_share_a_bucket_more_often(scheme: str) -> None:
    x = torch.nn.functional.normalize(random_vectors(1, 2, 2000, 32), dim=-1)
    noise = torch.nn.functional.normalize(random_vectors(1, 2, 2000, 32, seed=1), dim=-1)
    ids = hashed(x, 64, scheme)
    rates = []
    for noise_scale in (0.05, 0.3, 1.0):
        other = hashed(x + noise_scale * noise, 64, scheme)
        rates.append((ids == other).float().mean().item())
    rates.append((ids == hashed(noise, 64, scheme)).float().mean().item())
    assert rates[0] > 0.75 and rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.06, rates


@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_precision_is_hashed_in_float32(scheme: str) -> None:
    x = random_vectors(1, 2, 3000, 16).bfloat16()
    expected = hashed(x.float(), 64, scheme)
    assert torch.equal(hashed(x, 64, scheme), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hashed(x, 64, scheme), expected)


def test_no_gradient_flows() -> None:
    x = random_vectors(1, 1, 10, 4).requires_grad_()
    assert not hashed(x, 4, "rotation").requires_grad


@pytest.mark.parametrize(("scheme", "times_the_mean"), [("rotation", 1.3), ("floor", 6)])
def test_no_bucket_gets_most_random_vectors(scheme: str, times_the_mean: float) -> None:
    ids = hashed(random_vectors(1, 1, 64 * 200, 32), 64, scheme, n_hashes=1).flatten().long()
    counts = torch.bincount(ids, minlength=64).float()
    assert counts.max() < times_the_mean * 200


@pytest.mark.parametrize("n_buckets", [256, 512])  # in all 16 and 24 columns, of two factors
def test_rotations_fill_buckets_as_chance_would(n_buckets: int) -> None:
    """With independent columns the variance is several times as large."""
    ids = hashed(random_vectors(1, 4, n_buckets * 64, 32), n_buckets, "rotation").long()
    counts = torch.stack([torch.bincount(x, minlength=n_buckets) for x in ids.flatten(0, 2)]).double()
    assert 0.9 < float(counts.var() / counts.mean()) < 1.2


@pytest.mark.parametrize(("head_dim", "n_buckets"), [(64, 2048), (16, 256), (16, 4096), (48, 134), (4, 64)])
def test_columns_are_those_of_rotations(head_dim: int, n_buckets: int) -> None:
    rotations = draw_rotations(2, head_dim, 3, n_buckets, "rotation", seed=5)
    assert rotations.dtype == torch.float32
    for block in rotations.double().split(head_dim, dim=-1):
        products = block.mT @ block / head_dim
        identity = torch.eye(block.shape[-1], dtype=torch.float64).expand_as(products)
        torch.testing.assert_close(products, identity, atol=1e-5, rtol=0)


def test_dependent_columns_do_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random columns come close to it once in millions of draws."""
    monkeypatch.setattr(torch, "randn", lambda shape, **options: torch.ones(shape))
    draw = draw_rotations.__wrapped__  # bypasses the cache
    assert draw(1, 16, 1, 32, "rotation", seed=0).isfinite().all()
