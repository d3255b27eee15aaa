"""Keys with buckets of their own: their definition, every backend, and strict causality."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import Case, assert_fast_is_oracle, needs_compiler, own_key_cases
from torch import Tensor

from reformer_dist.ops.lsh import AttentionOptions, ChunkRule, WindowRule, bucket_attention
from reformer_dist.ops.lsh.reference import visible_pairs
from reformer_dist.ops.lsh.torch_tiles import attention, tiles


@given(own_key_cases("reference", longest=30, n_hashes=2))
def test_definition(case: Case) -> None:
    """In each round, the last `window` keys of the query's bucket up to the query, and as many around it."""
    *_, ids, mask = case.tensors()
    query_ids, rule = case.query_ids(), case.options.rule
    assert query_ids is not None and isinstance(rule, WindowRule)
    found = visible_pairs(ids, rule, mask, query_ids)
    real = torch.ones(case.batch, case.seq_len, dtype=torch.bool) if mask is None else mask
    for b, h, r, t in torch.cartesian_prod(*map(torch.arange, found.shape[:4])).tolist():
        members = [j for j in range(case.seq_len) if real[b, j] and ids[b, h, r, j] == query_ids[b, h, r, t]]
        end = sum(j <= t if rule.sees_self else j < t for j in members)
        last = end if rule.causal else end + rule.window - 1
        expected = members[max(0, end - rule.window) : last] if real[b, t] else []
        assert found[b, h, r, t].nonzero().flatten().tolist() == expected


@settings(max_examples=150, deadline=None)
@given(own_key_cases("torch"))
def test_tiles(case: Case) -> None:
    assert_fast_is_oracle(case)


@settings(max_examples=60, deadline=None)
@given(own_key_cases("torch"), st.sampled_from([1, 50, 128]), st.sampled_from([1, 50, 300]))
def test_tiles_in_many_groups_and_spans(case: Case, group_tokens: int, span_slots: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attention.GROUP_TOKENS, "cpu", group_tokens)
        patch.setitem(tiles.SPAN_SLOTS, "cpu", span_slots)
        assert_fast_is_oracle(case)


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(own_key_cases("native", longest=200), st.sampled_from([16, 48]))
def test_native(case: Case, head_dim: int) -> None:
    assert_fast_is_oracle(replace(case, head_dim=head_dim))


def run(backend: str, options: AttentionOptions, n_threads: int = 1) -> list[Tensor]:
    """Output and gradients, with most queries in a bucket of few keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(1, 2, 5000, 32, generator=generator) for _ in range(4))
    ids = torch.randint(0, 4, (1, 2, 2, 5000), generator=generator)
    query_ids = ids * torch.randint(0, 2, ids.shape, generator=generator)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        out = bucket_attention(*leaves, ids, replace(options, backend=backend), query_ids=query_ids)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize(("window", "causal"), [(100, True), (400, True), (100, False)])
def test_threads_change_no_bit(window: int, causal: bool) -> None:
    """Concurrent additions to the same key would."""
    options = AttentionOptions(WindowRule(window, causal, sees_self=True), 4, scale=1.0, own_keys=True)
    alone = run("native", options)
    for n_threads in (2, 3, 2):
        assert all(torch.equal(a, b) for a, b in zip(alone, run("native", options, n_threads), strict=True))


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("next_value_heads", [0, 1])
@pytest.mark.parametrize("window", [1, 2, 16])
def test_edits_change_nothing_before_them(backend: str, next_value_heads: int, window: int) -> None:
    """To the last bit. With values of the next token, an edit at t reaches the key of t - 1, unseen before t."""
    draw = torch.Generator().manual_seed(window)
    q, k, v = (torch.randn(1, 2, 200, 16, generator=draw) for _ in range(3))
    ids, query_ids = (torch.randint(0, 4, (1, 2, 2, 200), generator=draw) for _ in range(2))
    ids[:, :, 1] = query_ids[:, :, 1] = 0  # a local round: t - 1 is a neighbour of t
    rule = WindowRule(window, causal=True, sees_self=next_value_heads == 0)
    options = AttentionOptions(
        rule, 4, 1.0, next_value_heads=next_value_heads, own_keys=True, backend=backend, count_pairs_once=True
    )
    before = bucket_attention(q, k, v, ids, options, query_ids=query_ids)
    for t in (0, 1, 2, 100, 199):
        edited = [x.clone() for x in (q, k, v, ids, query_ids)]
        for x, new in zip(edited, (3.0, 2.0, -50.0), strict=False):
            x[:, :, t] = new
        for x in edited[3:]:
            x[:, :, 0, t] = (x[:, :, 0, t] + 1) % 4
        after = bucket_attention(*edited[:4], options, query_ids=edited[4])
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        if t > 0:
            assert not torch.equal(after[:, 0, t], before[:, 0, t])


def test_a_query_without_keys_gets_nothing() -> None:
    v = torch.randn(1, 1, 5, 8)
    ids = torch.arange(5).view(1, 1, 1, 5)
    options = AttentionOptions(WindowRule(4, causal=True, sees_self=True), 6, 1.0, own_keys=True, backend="torch")
    assert not bucket_attention(v, v, v, ids, options, query_ids=ids + 1).any()


def test_wrong_arguments_are_refused() -> None:
    rule, x, ids = (
        WindowRule(4, causal=True, sees_self=True),
        torch.randn(1, 1, 5, 8),
        torch.zeros(1, 1, 1, 5).int(),
    )
    options = AttentionOptions(rule, 6, 1.0, own_keys=True)
    with pytest.raises(ValueError, match=r"own_keys=True.*WindowRule"):
        AttentionOptions(ChunkRule(4, causal=True), 6, 1.0, own_keys=True)
    with pytest.raises(ValueError, match=r"sees_self=False.*own_keys=True"):
        AttentionOptions(WindowRule(4, causal=False), 6, 1.0, own_keys=True)
    with pytest.raises(ValueError, match=r"next_value_heads=1.*sees_self"):
        AttentionOptions(rule, 6, 1.0, own_keys=True, next_value_heads=1)
    with pytest.raises(ValueError, match=r"query_ids=None.*own_keys=True"):
        bucket_attention(x, x, x, ids, options)
    with pytest.raises(ValueError, match=r"query_ids=a tensor.*own_keys=True"):
        bucket_attention(x, x, x, ids, replace(options, own_keys=False), query_ids=ids)
    with pytest.raises(ValueError, match=r"k=None.*own_keys=True"):
        bucket_attention(x, None, x, ids, options, query_ids=ids)
    with pytest.raises(ValueError, match=r"query_ids=7.*n_buckets"):
        bucket_attention(x, x, x, ids, options, query_ids=ids + 7)
