"""The C library hashes like PyTorch, bit by bit where sums are exact, and each vector independently."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import needs_compiler

from reformer_dist.ops.lsh import draw_rotations, hash_vectors, hashing, seeded_rotations
from reformer_dist.ops.lsh.native import attention as native
from reformer_dist.ops.lsh.native.attention import NativeBackend

pytestmark = needs_compiler
N_BUCKETS = [1, 2, 4, 6, 14, 62, 64, 128, 134, 256, 4096, 40000]


@given(
    st.sampled_from(N_BUCKETS),
    st.sampled_from([16, 48, 64, 256]),
    st.integers(1, 40),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_ids_are_those_of_torch_where_sums_are_exact(
    n_buckets: int, head_dim: int, seq_len: int, n_hashes: int, dtype: torch.dtype, seed: int
) -> None:
    """Small integers: no sum is rounded, and ties are many."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (2, 3, seq_len, head_dim), generator=generator).to(dtype)
    rotations = draw_rotations(3, head_dim, n_hashes, n_buckets, "rotation", seed=seed).round()
    found = NativeBackend.hash(x, rotations, n_buckets, "rotation", None)
    expected = hashing.hash_vectors(x, rotations, n_buckets, "rotation")
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_factors_and_other_rotations() -> None:
    x = torch.randint(-2, 3, (1, 2, 50, 32), generator=torch.Generator().manual_seed(0)).float()
    rotations = seeded_rotations(2, 32, 3, 48, 7, factors=(4, 12)).round()
    found = NativeBackend.hash(x, rotations, 48, "rotation", (4, 12))
    assert torch.equal(found, hashing.hash_vectors(x, rotations, 48, "rotation", factors=(4, 12)))
    assert found.unique().numel() > 10


def test_an_id_depends_on_its_vector_alone() -> None:
    """Decoding hashes one token at a time, and a rank only its slice."""
    x = torch.randn(1, 2, 101, 48, generator=torch.Generator().manual_seed(1))
    rotations = draw_rotations(2, 48, 4, 128, "rotation", seed=3)
    whole = NativeBackend.hash(x, rotations, 128, "rotation", None)
    for first, last in ((0, 1), (7, 8), (50, 101), (3, 99)):
        part = NativeBackend.hash(x[:, :, first:last], rotations, 128, "rotation", None)
        assert torch.equal(part, whole[..., first:last])


def test_it_is_the_default_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rotations = torch.randn(1, 1, 8, 16), draw_rotations(1, 16, 1, 4, "rotation", seed=0)
    calls = []
    monkeypatch.setattr(native, "hash_rows", lambda *arguments: calls.append(arguments))
    for backend in ("auto", "native", "torch"):
        hash_vectors(x, rotations, 4, "rotation", backend=backend)
    assert len(calls) == 2
