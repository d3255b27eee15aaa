"""The hash kernel returns the ids of `hash_vectors`, ties included where sums are exact, except near ties."""

from __future__ import annotations

import pytest
import torch

from reformer_dist.ops.lsh import draw_rotations, hash_vectors, hashing

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("scheme", "n_buckets"), [("rotation", 2), ("rotation", 24), ("rotation", 1024), ("floor", 4), ("floor", 512)]
)
@pytest.mark.parametrize("head_dim", [16, 48])
def test_ids(scheme, n_buckets, head_dim):
    rotations = draw_rotations(2, head_dim, 3, n_buckets, scheme, seed=5)
    x = torch.randn(2, 70, 2, head_dim, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    if scheme == "rotation":  # small integers: exact sums and many ties
        x, rotations = x.round(), rotations.round()
    expected = hashing.hash_vectors(x, rotations, n_buckets, scheme)
    actual = hash_vectors(x.to(DEVICE), rotations, n_buckets, scheme, backend="triton").cpu()
    assert actual.dtype == expected.dtype
    if scheme == "rotation":
        assert torch.equal(actual, expected)
    else:
        assert (actual != expected).float().mean() < 5e-3


@pytest.mark.parametrize(("available", "rows"), [(2**17, 128), (2**15, 32), (2**14, 0)])
def test_rows_fit_in_shared_memory(monkeypatch, available, rows):
    """A card with less shared memory takes fewer rows per program, or PyTorch where MIN_ROWS do not fit."""
    from reformer_dist.ops.lsh.triton_kernels import hashing as kernels

    monkeypatch.setattr(kernels, "INTERPRETER_SHARED_MEMORY", available)
    monkeypatch.setattr(kernels, "_shared_memory", lambda device: available)
    assert kernels._max_rows(torch.empty(1, device=DEVICE), 64, 16) == rows
    test_ids("rotation", 24, 48)


def test_wide_factor_falls_back_to_torch():
    rotations = draw_rotations(2, 16, 3, 262, "rotation", seed=5)  # 2 * 131 has no smaller even factors
    x = torch.randn(1, 2, 70, 16, generator=torch.Generator().manual_seed(0))
    expected = hashing.hash_vectors(x, rotations, 262, "rotation")
    actual = hash_vectors(x.to(DEVICE), rotations, 262, "rotation", backend="triton")
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ids_differ_only_near_ties(dtype):
    rotations = draw_rotations(2, 64, 2, 64, "rotation", seed=5)
    x = torch.randn(1, 2, 300, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = hashing.hash_vectors(x, rotations, 64, "rotation")
    actual = hash_vectors(x.to(DEVICE), rotations, 64, "rotation", backend="triton").cpu()
    assert (actual != expected).float().mean() < 2e-3


def test_one_bucket():
    rotations = draw_rotations(2, 16, 2, 1, "rotation", seed=5)
    assert not hash_vectors(
        torch.randn(1, 2, 9, 16, device=DEVICE), rotations, 1, "rotation", backend="triton"
    ).any()
