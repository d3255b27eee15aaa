"""The hash kernel gives the ids of `hash_vectors`: all where sums are exact, ties included, else but near ties."""

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
    if scheme == "rotation":  # small whole numbers: sums are exact, and ties are many
        x, rotations = x.round(), rotations.round()
    right = hashing.hash_vectors(x, rotations, n_buckets, scheme)
    found = hash_vectors(x.to(DEVICE), rotations, n_buckets, scheme, backend="triton").cpu()
    assert found.dtype == right.dtype
    if scheme == "rotation":
        assert torch.equal(found, right)
    else:
        assert (found != right).float().mean() < 5e-3


@pytest.mark.parametrize(("room", "rows"), [(2**17, 128), (2**15, 32), (2**14, 0)])
def test_whatever_room_there_is(monkeypatch, room, rows):
    """Cards have less shared memory than others: fewer rows at a time, or, where nothing fits, no kernel."""
    from reformer_dist.ops.lsh.triton_kernels import hashing as kernels

    monkeypatch.setattr(kernels, "INTERPRETED_ROOM", room)
    monkeypatch.setattr(kernels, "_shared_memory", lambda device: room)
    assert kernels._rows_that_fit(torch.empty(1, device=DEVICE), 64, 16) == rows
    test_ids("rotation", 24, 48)


def test_a_factor_too_wide_for_the_kernel():
    rotations = draw_rotations(2, 16, 3, 262, "rotation", seed=5)  # 2 * 131 has no smaller even factors
    x = torch.randn(1, 2, 70, 16, generator=torch.Generator().manual_seed(0))
    right = hashing.hash_vectors(x, rotations, 262, "rotation")
    found = hash_vectors(x.to(DEVICE), rotations, 262, "rotation", backend="triton")
    assert torch.equal(found.cpu(), right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_near_ties_alone_may_differ(dtype):
    rotations = draw_rotations(2, 64, 2, 64, "rotation", seed=5)
    x = torch.randn(1, 2, 300, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    right = hashing.hash_vectors(x, rotations, 64, "rotation")
    found = hash_vectors(x.to(DEVICE), rotations, 64, "rotation", backend="triton").cpu()
    assert (found != right).float().mean() < 2e-3


def test_one_bucket():
    rotations = draw_rotations(2, 16, 2, 1, "rotation", seed=5)
    assert not hash_vectors(
        torch.randn(1, 2, 9, 16, device=DEVICE), rotations, 1, "rotation", backend="triton"
    ).any()
