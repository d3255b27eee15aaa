"""Outputs and gradients of the kernels equal the reference, under Triton's interpreter or on a GPU if present."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CASES, KernelCase, errors

from reformer_dist.ops.lsh import AttentionOptions, WindowRule, bucket_attention

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients(case: KernelCase):
    measured = errors(case, DEVICE)
    assert all(error <= case.tolerance for error in measured.values()), measured


def test_groups_of_heads(monkeypatch):
    from reformer_dist.ops.lsh.triton_kernels import tuning

    monkeypatch.setattr(tuning, "GROUP_TOKENS", 200)  # two groups of two heads
    measured = errors(CASES["shared keys"], DEVICE)
    assert all(error <= 1e-5 for error in measured.values()), measured


BY_64 = {"n_buckets": 2, "n_hashes": 1, "seq_len": 130}
SPLIT_CASES = {
    "shared keys": KernelCase(WindowRule(64, True), shared=True, crowded=True, **BY_64),
    "every option": KernelCase(
        WindowRule(64, True, True),
        n_buckets=2,
        seq_len=130,
        crowded=True,
        padding=True,
        once=True,
        dropout=0.2,
        documents=True,
    ),
    "wide": KernelCase(WindowRule(64, True), head_dim=80, dtype=torch.bfloat16, tolerance=0.06, **BY_64),
}


@pytest.fixture
def split_tiles(monkeypatch):
    """First tiles of buckets and others by programs of their own, in float32 and for short sequences, too."""
    from reformer_dist.ops.lsh.triton_kernels import tuning

    monkeypatch.setattr(tuning, "SPLIT_SEQ_LEN", 0)
    monkeypatch.setattr(tuning, "NARROW_FLOAT32", tuning.NARROW)


@pytest.mark.parametrize("case", SPLIT_CASES.values(), ids=SPLIT_CASES)
def test_split_tiles(case: KernelCase, split_tiles):
    measured = errors(case, DEVICE)
    assert all(error <= case.tolerance for error in measured.values()), measured


def test_tiles_in_the_list_follow_each_other(split_tiles):
    """Tiles of 16 rows from rank 64 of each bucket on, as many as there are rows; programs take turns."""
    from reformer_dist.ops.lsh.attention import Shard
    from reformer_dist.ops.lsh.triton_kernels import tuning
    from reformer_dist.ops.lsh.triton_kernels.tiles import tile_heads

    ids = (torch.arange(400) % 7 == 0).to(DEVICE, torch.int64).expand(1, 2, 400)
    options = AttentionOptions(WindowRule(64, True), 6, 1.0, backend="triton")
    tiles = tile_heads(Shard(ids, 6, None, 400, has_padding=False), options, tuning.NARROW)
    sizes = torch.bincount(ids[0, 0], minlength=6).tolist()
    assert sizes == [342, 58, 0, 0, 0, 0] and tiles.n_first == 6 and tiles.table.shape[2] == 6 + 1 + 25
    for table in tiles.table[0].tolist():
        assert table[:2] == [[0, 0, 342, 342], [342, 342, 400, 400]] and not any(map(any, table[2:6]))
        n_listed = table[6][0]
        assert sorted(table[7 : 7 + n_listed]) == [[first, 0, 342, 342] for first in range(64, 342, 16)]
        assert not any(map(any, table[7 + n_listed :]))


@pytest.mark.parametrize("case", ["shared", "own keys", "bf16 in full tiles", "bf16 in split tiles"])
def test_causality_is_bitwise(case, request):
    own_keys, is_full = case == "own keys", case.startswith("bf16")
    generator = torch.Generator().manual_seed(0)
    seq_len, edited_from, n_buckets = (230, 137, 2) if is_full else (90, 50, 4)
    if case == "bf16 in split tiles":
        request.getfixturevalue("split_tiles")
        seq_len = 160
    window, dtype = (64, torch.bfloat16) if is_full else (20, torch.float32)
    q, v = (torch.randn(1, 2, seq_len, 16, generator=generator).to(DEVICE, dtype) for _ in range(2))
    ids = torch.randint(0, n_buckets, (1, 2, 2, seq_len), generator=generator).to(DEVICE)
    rule = WindowRule(window, True, sees_self=own_keys)
    options = AttentionOptions(rule, n_buckets, 0.5, backend="triton", own_keys=own_keys)

    def attend(q, v, ids):
        k, query_ids = (v, ids.roll(1, dims=1)) if own_keys else (None, None)
        return bucket_attention(q, k, v, ids, options, query_ids=query_ids)

    before = attend(q, v, ids)
    edited = [x.clone() for x in (q, v, ids)]
    for x in edited[:2]:
        x[:, :, edited_from:] = torch.randn(x[:, :, edited_from:].shape, generator=generator).to(x)
    draw = torch.randint(0, n_buckets, ids[..., edited_from:].shape, generator=generator)
    edited[2][..., edited_from:] = draw.to(DEVICE)
    after = attend(*edited)
    assert torch.equal(before[:, :, :edited_from], after[:, :, :edited_from])
    assert not torch.equal(before[:, :, edited_from:], after[:, :, edited_from:])


@pytest.mark.parametrize("own_keys", [False, True])
def test_backward_is_deterministic(own_keys):
    def run():
        generator = torch.Generator().manual_seed(0)
        q, v = (torch.randn(1, 1, 60, 16, generator=generator).to(DEVICE).requires_grad_() for _ in range(2))
        ids = torch.randint(0, 2, (1, 1, 2, 60), generator=generator).to(DEVICE)
        options = AttentionOptions(
            WindowRule(9, True, sees_self=own_keys), 2, 0.5, backend="triton", own_keys=own_keys
        )
        k, query_ids = (v, 1 - ids) if own_keys else (None, None)
        out = bucket_attention(q, k, v, ids, options, query_ids=query_ids)
        return [out, *torch.autograd.grad(out.square().sum(), (q, v))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("n_rounds", [1, 2])
def test_values_of_the_next_token(n_rounds):
    """With queries that have no key, which get 0."""
    draw = torch.Generator().manual_seed(n_rounds)
    q, v, d_out = (torch.randn(1, 2, 70, 16, generator=draw).to(DEVICE) for _ in range(3))
    ids = torch.randint(0, 4, (1, 2, n_rounds, 70), generator=draw).to(DEVICE)
    results = []
    for backend in ("triton", "reference"):
        options = AttentionOptions(WindowRule(20, True), 4, 0.5, next_value_heads=1, backend=backend)
        leaves = [x.clone().requires_grad_() for x in (q, v)]
        out = bucket_attention(leaves[0], None, leaves[1], ids, options)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, d_out)])
    assert not results[0][0][:, :, 0].any()
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
