"""Values of the next token: their definition, every backend, and strict causality at the token that is moved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import Case, cases, chunk_rules, needs_compiler, window_rules
from torch import Tensor

from reformer_dist.ops.lsh import AttentionOptions, WindowRule, bucket_attention
from reformer_dist.ops.lsh.reference import visible_pairs
from reformer_dist.ops.lsh.shared_keys import shared_keys


def shifted_cases(head_dims: st.SearchStrategy[int] | None = None) -> st.SearchStrategy[Case]:
    """Cases in which no token attends to itself, with values of the next token in 1 to all heads."""

    def shift(case: Case, n_heads: int, head_dim: int | None) -> Case:
        options = replace(
            case.options,
            rule=replace(case.options.rule, sees_self=False),
            next_value_heads=1 + n_heads % case.n_heads,
        )
        return replace(case, options=options, head_dim=head_dim or case.head_dim)

    return st.builds(shift, cases(RULES), st.integers(0, 2), st.none() if head_dims is None else head_dims)


RULES = st.one_of(window_rules(), chunk_rules())


def run(case: Case, backend: str) -> list[Tensor]:
    """Output and gradients of q and v, with shared keys."""
    q, _, v, ids, mask = case.tensors()
    d_out = torch.randn(v.shape, generator=torch.Generator().manual_seed(case.seed))
    leaves = [q.requires_grad_(), v.requires_grad_()]
    out = bucket_attention(leaves[0], None, leaves[1], ids, replace(case.options, backend=backend), mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


@given(shifted_cases())
def test_definition(case: Case) -> None:
    """Token j has the value of token j + 1, if both are real; a query without keys gets 0."""
    q, _, v, ids, mask = case.tensors()
    options = replace(case.options, dropout=0.0, backend="reference")
    found = bucket_attention(q, None, v, ids, options, mask)
    pairs = visible_pairs(ids, options.rule, mask).float()
    if options.count_pairs_once:
        pairs = pairs.sum(2, keepdim=True).clamp(max=1)
    weights = pairs.sum(2) * (options.scale * q @ shared_keys(q).transpose(2, 3)).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    real = torch.ones(case.batch, case.seq_len, dtype=torch.bool) if mask is None else mask
    for b in range(case.batch):
        for h in range(case.n_heads):
            values = v[b, h] * real[b, :, None]
            if h < options.next_value_heads:
                values = torch.cat([values[1:], torch.zeros_like(values[:1])])
            expected = weights[b, h] @ values
            torch.testing.assert_close(found[b, h], expected, atol=1e-5, rtol=1e-5)


@given(shifted_cases())
def test_tiles(case: Case) -> None:
    for one, other in zip(run(case, "torch"), run(case, "reference"), strict=True):
        assert (one - other).abs().max() <= 2e-5 * (1 + other.abs().max())


@needs_compiler
@given(shifted_cases(st.sampled_from([16, 48])))
def test_native(case: Case) -> None:
    rule = case.options.rule
    if not isinstance(rule, WindowRule):
        rule = WindowRule(rule.chunk_len, rule.causal)
    case = replace(case, options=replace(case.options, rule=rule))
    for one, other in zip(run(case, "native"), run(case, "reference"), strict=True):
        assert (one - other).abs().max() <= 2e-5 * (1 + other.abs().max())


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("window", [1, 2, 16])
def test_edits_change_nothing_before_them(backend: str, window: int) -> None:
    """To the last bit: an edit at t reaches the key of t - 1, which no token before t attends to."""
    draw = torch.Generator().manual_seed(window)
    q, v = (torch.randn(1, 2, 200, 16, generator=draw) for _ in range(2))
    ids = torch.randint(0, 4, (1, 2, 2, 200), generator=draw)
    ids[:, :, 1] = 0  # a local round: t - 1 is a neighbour of t
    options = AttentionOptions(WindowRule(window, causal=True), 4, 1.0, next_value_heads=1, backend=backend)
    before = bucket_attention(q, None, v, ids, options)
    for t in (0, 1, 2, 100, 199):
        edited_q, edited_v, edited_ids = q.clone(), v.clone(), ids.clone()
        edited_q[:, :, t], edited_v[:, :, t] = 3.0, -50.0
        edited_ids[:, :, 0, t] = (ids[:, :, 0, t] + 1) % 4
        after = bucket_attention(edited_q, None, edited_v, edited_ids, options)
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        if window > 1 and t > 0:
            assert not torch.equal(after[:, 0, t], before[:, 0, t])


def test_a_query_without_keys_does_not_see_its_successor() -> None:
    v = torch.randn(1, 1, 5, 8)
    ids = torch.arange(5).view(1, 1, 1, 5)
    options = AttentionOptions(WindowRule(4, causal=True), 6, 1.0, next_value_heads=1)
    assert not bucket_attention(v, None, v, ids, options).any()


def test_rules_by_which_tokens_attend_to_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match=r"next_value_heads=1.*sees_self"):
        AttentionOptions(WindowRule(4, causal=True, sees_self=True), 1, 1.0, next_value_heads=1)
