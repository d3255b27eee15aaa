"""The torch backend matches the reference: outputs and gradients, over drawn shapes, rules and options."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import Case, assert_fast_is_oracle, cases, chunk_rules, window_rules

from reformer_dist.ops.lsh import AttentionOptions, ChunkRule, WindowRule, bucket_attention
from reformer_dist.ops.lsh.torch_tiles import attention, tiles


@settings(max_examples=120, deadline=None)
@given(cases(window_rules()))
def test_window_rule(case: Case) -> None:
    assert_fast_is_oracle(case)


@settings(max_examples=100, deadline=None)
@given(cases(chunk_rules()))
def test_chunk_rule(case: Case) -> None:
    assert_fast_is_oracle(case)


@settings(max_examples=60, deadline=None)
@given(
    cases(st.one_of(window_rules(), chunk_rules())),
    st.sampled_from([1, 50, 128]),
    st.sampled_from([1, 50, 300]),
    st.sampled_from([0, 1, 2, 8]),
)
def test_many_groups_spans_and_deep_buckets(
    case: Case, group_tokens: int, span_slots: int, deepest_level: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attention.GROUP_TOKENS, "cpu", group_tokens)
        patch.setitem(tiles.SPAN_SLOTS, "cpu", span_slots)
        patch.setattr(tiles, "MAX_SHALLOW_TILES", deepest_level)
        assert_fast_is_oracle(case)


@settings(max_examples=40, deadline=None)
@given(cases(st.one_of(window_rules(), chunk_rules())))
def test_bf16(case: Case) -> None:
    # the backward computes rowsum(dO * o) from an output rounded to 8 bits, over up to 16 dimensions:
    # where the true dq is 0 (a single key), only that rounding remains
    assert_fast_is_oracle(case, torch.bfloat16, tolerance=0.1)


@pytest.mark.parametrize(
    "rule",
    [
        WindowRule(24, causal=True),
        WindowRule(64, causal=False),
        WindowRule(40, causal=True, sees_self=True),
        ChunkRule(32, causal=True),
        ChunkRule(20, causal=False, n_before=1, n_after=1, wrap=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("n_buckets", [1, 4])
def test_tiles_of_every_length(rule: WindowRule | ChunkRule, n_buckets: int) -> None:
    """Lengths at which the window rule's tiles are 16, 32 and 64 slots, and buckets span several tiles."""
    for seq_len in (63, 129, 300):
        options = AttentionOptions(rule, n_buckets, scale=0.5)
        assert_fast_is_oracle(Case(1, 2, 2, seq_len, 8, options, "some", seed=seq_len))


def test_transposed_inputs_and_grads() -> None:
    """Heads come from a projection as a transposed view, and so does the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 33, 3, 8, generator=generator, requires_grad=True)
    bucket_ids = torch.randint(0, 4, (2, 3, 2, 33), generator=generator)
    options = AttentionOptions(WindowRule(8, causal=True), 4, scale=1.0)
    d_out = torch.randn(2, 33, 3, 8, generator=generator)
    grads = []
    for heads in (x.transpose(1, 2), x.transpose(1, 2).contiguous()):
        out = bucket_attention(heads, heads, heads, bucket_ids, options).transpose(1, 2)
        grads.append(torch.autograd.grad(out, x, d_out)[0])
    assert torch.equal(*grads)
