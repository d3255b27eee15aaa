"""Shared keys computed inside attention: outputs and gradients match those with explicit keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import Case, cases, chunk_rules, window_rules
from torch import Tensor

from reformer_dist.ops.lsh import bucket_attention
from reformer_dist.ops.lsh.shared_keys import shared_keys, shared_keys_backward


def with_both_keys(case: Case, dtype: torch.dtype, zero: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """(name, with internal keys, with explicit keys) of output and gradients; `zero` [S]: queries of norm 0."""
    q, _, v, bucket_ids, mask = case.tensors()
    q = q.masked_fill(zero.unsqueeze(1), 0.0)
    d_out = torch.randn(v.shape, generator=torch.Generator().manual_seed(case.seed + 1)).to(dtype)
    found = []
    for is_inside in (True, False):
        leaves = tuple(x.to(dtype).requires_grad_() for x in (q, v))
        keys = None if is_inside else shared_keys(leaves[0])
        out = bucket_attention(leaves[0], keys, leaves[1], bucket_ids, case.options, mask)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, d_out)])
    return list(zip(("output", "dq", "dv"), *found, strict=True))


def assert_near(found: Tensor, right: Tensor, tolerance: float) -> None:
    assert found.dtype == right.dtype and found.isfinite().all()
    if right.numel():
        error = (found.double() - right.double()).abs().max().item()
        assert error <= tolerance * (1 + right.double().abs().max().item()), f"off by {error}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@settings(max_examples=40, deadline=None)
@given(case=cases(st.one_of(window_rules(), chunk_rules())), every=st.integers(1, 9))
def test_internal_keys_match_explicit_keys(dtype: torch.dtype, tolerance: float, case: Case, every: int) -> None:
    """Queries of norm 0 are compared separately, since their gradients are those of their keys / 1e-12."""
    zero = torch.arange(case.seq_len) % every == every - 1
    for name, inside, before in with_both_keys(case, dtype, zero):
        if name == "dq":
            assert_near(inside[:, :, zero].double() / 1e12, before[:, :, zero].double() / 1e12, tolerance)
            assert_near(inside[:, :, ~zero], before[:, :, ~zero], tolerance)
        elif name == "dv":
            assert_near(inside, before, tolerance)
        else:
            assert torch.equal(inside, before)


@pytest.mark.parametrize("size", [1e-8, 1e-3, 1.0, 1e3, 1e8])
@pytest.mark.parametrize("head_dim", [1, 2, 7, 64])
def test_backward_is_that_of_autograd(size: float, head_dim: int) -> None:
    """Against float64, per vector, since the gradient of a short vector is large."""
    draw = torch.Generator().manual_seed(head_dim)
    q = torch.randn(3, 50, head_dim, generator=draw) * size
    q[1, ::7] = 0.0
    d_keys = torch.randn(q.shape, generator=draw)
    wide = q.double().requires_grad_()
    keys = F.normalize(wide, dim=-1)
    torch.testing.assert_close(shared_keys(q).double(), keys.detach(), atol=1e-6, rtol=0)
    (right,) = torch.autograd.grad(keys, wide, d_keys.double())
    found = shared_keys_backward(q, d_keys)
    assert found.dtype == torch.float32
    # the component along q cancels, so the error is relative to d_keys / |q|
    scale = d_keys.double().norm(dim=-1) / q.double().norm(dim=-1).clamp_min(1e-12)
    error = (found.double() - right).norm(dim=-1)
    assert (error <= 1e-6 * scale).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_narrow_queries_are_float32(dtype: torch.dtype) -> None:
    """Keys are rounded once, at the end; float16 norms would overflow."""
    draw = torch.Generator().manual_seed(0)
    q = (torch.randn(20, 4096, generator=draw) * 2000).to(dtype)
    d_keys = torch.randn(q.shape, generator=draw)
    wide = q.double().requires_grad_()
    right = F.normalize(wide, dim=-1)
    keys = shared_keys(q)
    assert keys.dtype == dtype
    assert (keys == right.to(dtype)).float().mean().item() > 0.999
    (grad,) = torch.autograd.grad(right, wide, d_keys.double())
    found = shared_keys_backward(q, d_keys)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), grad, atol=1e-6 * grad.abs().max().item(), rtol=0)
