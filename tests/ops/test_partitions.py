"""Partitions of the sorted order, attended separately, combine to the reference: outputs and all gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import Case, cases, needs_compiler, window_rules
from support.shards import attend_by_partition

from reformer_dist.ops.lsh import AttentionOptions, WindowRule, bucket_attention
from reformer_dist.ops.lsh.native import calls


def assert_partitions_match_reference(
    case: Case,
    name: str,
    size: int,
    *,
    shared: bool,
    dtype: torch.dtype = torch.float32,
    local_round: bool = False,
) -> None:
    q, k, v, ids, mask = case.tensors()
    if local_round:
        ids[:, :, -1] = 0
    q, k, v = (x.to(dtype) for x in (q, k, v))
    d_out = torch.randn(v.shape, generator=torch.Generator().manual_seed(case.seed)).to(dtype)
    reference = replace(case.options, backend="reference")
    leaves = [x.float().clone().requires_grad_() for x in ((q, v) if shared else (q, k, v))]
    out = bucket_attention(leaves[0], None if shared else leaves[1], leaves[-1], ids, reference, mask)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, d_out.float())]
    options = replace(case.options, backend=name)
    actual = attend_by_partition(q, None if shared else k, v, ids, options, mask, d_out, size)
    # a gradient that is 0 for a single key has the rounding errors of the terms that cancel
    largest = max(1.0, *(x.abs().max().item() for x in expected))
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= 5e-5 * largest


@settings(max_examples=60, deadline=None)
@given(cases(window_rules()), st.integers(1, 5), st.booleans())
def test_torch(case: Case, size: int, shared: bool) -> None:
    assert_partitions_match_reference(case, "torch", size, shared=shared)


@needs_compiler
@settings(max_examples=100, deadline=None)
@given(cases(window_rules()), st.integers(1, 5), st.booleans(), st.sampled_from([16, 48]))
def test_native(case: Case, size: int, shared: bool, head_dim: int) -> None:
    assert_partitions_match_reference(replace(case, head_dim=head_dim), "native", size, shared=shared)


@needs_compiler
@settings(max_examples=30, deadline=None)
@given(cases(window_rules(), longest=700, n_hashes=2), st.integers(2, 4))
def test_native_spans_start_inside_buckets(case: Case, size: int) -> None:
    """Few long buckets, each divided among several partitions and into several spans."""
    rule = replace(case.options.rule, window=1 + case.seed % 200)
    case = replace(case, head_dim=16, options=replace(case.options, rule=rule, n_buckets=1 + case.seed % 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "SPAN_LEN", 16)
        assert_partitions_match_reference(case, "native", size, shared=True)


@needs_compiler
@settings(max_examples=20, deadline=None)
@given(cases(window_rules()), st.integers(2, 3))
def test_native_in_half_precision(case: Case, size: int) -> None:
    """Inputs in half precision are widened to float32, and results are not rounded again."""
    case = replace(case, head_dim=32)
    assert_partitions_match_reference(case, "native", size, shared=True, dtype=torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("seed", range(3))
def test_fewer_rows_than_the_window_reaches(seed: int) -> None:
    """Shared rounds are counted by position codes of the whole order, however few rows a partition holds."""
    options = AttentionOptions(WindowRule(64, causal=True), 8, 0.5, count_pairs_once=True)
    case = Case(1, 1, 3, 100, 16, options, "none", seed)
    assert_partitions_match_reference(case, "native", 4, shared=True, local_round=True)
