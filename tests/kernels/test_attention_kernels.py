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


@pytest.mark.parametrize("case", ["shared", "own keys", "bf16 in full tiles"])
def test_causality_is_bitwise(case):
    own_keys, is_full = case == "own keys", case == "bf16 in full tiles"
    generator = torch.Generator().manual_seed(0)
    seq_len, edited_from, n_buckets = (230, 137, 2) if is_full else (90, 50, 4)
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
