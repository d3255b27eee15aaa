"""Parts of an exchange: packed bits, row formats, and the expected traffic."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reformer_dist.config import ParallelConfig
from reformer_dist.parallel.row_format import RowFormat, pack_bits, unpack_bits
from reformer_dist.parallel.traffic import (
    LayerShape,
    all_gather_bytes,
    bucket_bytes,
    choose_mesh,
    describe_mesh,
    head_bytes,
    mean_other_ranks,
)

LAYER = LayerShape(rows=2, slice_len=512, n_heads=8, head_dim=64, n_hashes=4, n_buckets=128, element_size=2)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int16, torch.uint8]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=2),
    n=st.integers(1, 70),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_packed_bits_round_trip(shape: list[int], n: int, share: float, seed: int) -> None:
    mask = torch.rand(*shape, n, generator=torch.Generator().manual_seed(seed)) < share
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape, -(-n // 8))
    assert torch.equal(unpack_bits(packed, n), mask)
    # bits past the end are 0, so equal masks are equal bytes
    assert int(unpack_bits(packed, packed.shape[-1] * 8).sum()) == int(mask.sum())


def test_bit_order() -> None:
    assert pack_bits(torch.eye(9, dtype=torch.bool)).tolist() == [[1 << i, 0] for i in range(8)] + [[0, 1]]


@settings(max_examples=60, deadline=None)
@given(
    n_rows=st.integers(0, 7),
    fields=st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(1, 9)), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_row_formats_round_trip(n_rows: int, fields: list[tuple[torch.dtype, int]], seed: int) -> None:
    """Any mixture of dtypes and widths, including odd widths of bf16 and bytes, and zero rows."""
    row_format = RowFormat(**{f"field{i}": field for i, field in enumerate(fields)})
    generator = torch.Generator().manual_seed(seed)
    values = {
        f"field{i}": (torch.randn(n_rows, width, generator=generator) * 50).abs().to(dtype)
        for i, (dtype, width) in enumerate(fields)
    }
    rows = row_format.pack(**values)
    assert rows.dtype == torch.uint8 and rows.shape == (n_rows, row_format.nbytes)
    assert row_format.nbytes == sum(-(-width * dtype.itemsize // 4) * 4 for dtype, width in fields)
    arrived = rows.clone()  # as if it had been sent
    for name, value in values.items():
        found = row_format.field(arrived, name)
        assert found.dtype == value.dtype and torch.equal(found, value)


def test_a_field_is_a_view_and_may_be_one_number() -> None:
    row_format = RowFormat(o=(torch.bfloat16, 3), lse=(torch.float32, 1))
    rows = row_format.pack(lse=torch.arange(4.0), o=torch.ones(4, 3, dtype=torch.bfloat16))
    assert row_format.nbytes == 12
    row_format.field(rows, "o").fill_(2.0)
    assert row_format.field(rows, "lse").squeeze(1).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert row_format.field(rows[2:], "lse").tolist() == [[2.0], [3.0]]
    assert (row_format.field(rows, "o") == 2.0).all()


@pytest.mark.parametrize("n_hashes", [1, 2, 4])
@pytest.mark.parametrize("n_ranks", [1, 2, 3, 5])
def test_mean_other_ranks(n_ranks: int, n_hashes: int) -> None:
    """The mean over all assignments of a token's rounds to ranks, for a token of rank 0."""
    ways = list(itertools.product(range(n_ranks), repeat=n_hashes))
    mean = sum(len(set(way) - {0}) for way in ways) / len(ways)
    assert mean_other_ranks(n_ranks, n_hashes) == pytest.approx(mean)


def test_traffic_formulas() -> None:
    """Computed by hand: 8192 tokens with vectors of 128 bytes and 4 bytes of ids."""
    assert head_bytes(LAYER, 1) == bucket_bytes(LAYER, 8, 1) == all_gather_bytes(LAYER, 1) == 0.0
    assert head_bytes(LAYER, 4) == 8192 * (3 * 128 + 4) * 3 / 4
    assert all_gather_bytes(LAYER, 4) == 8192 * 2 * 128 * 3
    counts = 3 * 4 * (2 * 8) * 4 * 128 / 2
    bits = 2 * 8192 / 8
    assert bucket_bytes(LAYER, 1, 2, sent=0.5, returned=0.25) == pytest.approx(
        counts + bits + 8192 * (0.5 * (2 * 128 + 4) + 0.25 * (128 + 4))
    )
    even = mean_other_ranks(2, 4)
    assert bucket_bytes(LAYER, 1, 2) == bucket_bytes(LAYER, 1, 2, sent=even, returned=even)
    # the ids of three rounds are padded to four bytes
    three, four = (replace(LAYER, n_hashes=n_hashes) for n_hashes in (3, 4))
    difference = bucket_bytes(four, 1, 2, sent=1.0, returned=0.0) - bucket_bytes(
        three, 1, 2, sent=1.0, returned=0.0
    )
    assert difference == pytest.approx(counts / 4)
    # an odd width in bf16 is padded by two bytes, and ids of many buckets are wider
    assert replace(LAYER, head_dim=5).vector == 12
    assert replace(LAYER, n_buckets=256).ids == 8


@pytest.mark.parametrize("size", [2, 4, 8])
def test_heads_inside_a_node(size: int) -> None:
    """Within a node, head exchange alone is cheapest; if it does not fit, the best mesh depends on the rounds."""
    meshes = ParallelConfig(sequence=size).meshes()
    for n_hashes in (1, 2, 8):
        assert choose_mesh(meshes, replace(LAYER, n_hashes=n_hashes), ranks_per_node=8) == (size, 1)
    two_heads = replace(LAYER, n_heads=6)
    assert choose_mesh(meshes, two_heads, ranks_per_node=8) == (2, size // 2)
    # with one round, a token is sent to at most one rank, however many there are
    one_round = choose_mesh(meshes, replace(two_heads, n_hashes=1), ranks_per_node=8)
    assert one_round == ((2, 1) if size == 2 else (1, size))


def test_heads_over_nodes() -> None:
    """Bucket groups stay within a node, whose ranks determine their size."""
    two_nodes = ParallelConfig(sequence=16).meshes()
    assert choose_mesh(two_nodes, LAYER, ranks_per_node=8) == (8, 2)
    assert choose_mesh(two_nodes, replace(LAYER, n_heads=2), ranks_per_node=8) == (2, 8)
    # a head group spans nodes even if it has no more ranks than a node
    assert choose_mesh(two_nodes, replace(LAYER, n_hashes=1), ranks_per_node=8) == (2, 8)
    two_rounds, meshes = replace(LAYER, n_hashes=2), ParallelConfig(sequence=4).meshes()
    assert choose_mesh(meshes, two_rounds, ranks_per_node=4) == (4, 1)
    assert choose_mesh(meshes, two_rounds, ranks_per_node=2) == (2, 2)


def test_ranks_that_do_not_divide_heads_exchange_buckets() -> None:
    assert choose_mesh(ParallelConfig(sequence=3).meshes(), LAYER, ranks_per_node=8) == (1, 3)
    assert choose_mesh(ParallelConfig(sequence=6).meshes(), LAYER, ranks_per_node=8) == (2, 3)
    assert choose_mesh(ParallelConfig().meshes(), LAYER, ranks_per_node=8) == (1, 1)


def test_no_mesh_fits() -> None:
    with pytest.raises(ValueError, match=r"\(3, 1\).* 8"):
        choose_mesh([(3, 1)], LAYER, ranks_per_node=8)


def test_mesh_description() -> None:
    """Names the ranks of each axis, the expected bytes and those of an all-gather."""
    line = describe_mesh(4, 2, LAYER)
    sent = (head_bytes(LAYER, 4) + bucket_bytes(LAYER, 4, 2)) / 2**20
    for words in (
        "over 8 ranks",
        "parallel.heads=4",
        "parallel.buckets=2",
        f"{sent:.1f} MiB",
        f"{all_gather_bytes(LAYER, 8) / 2**20:.1f} MiB",
    ):
        assert words in line
    assert "\n" not in line
