"""Special cases in which attention over buckets is a dense softmax that can be written in three lines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reformer_dist.ops.lsh import AttentionOptions, ChunkRule, Rule, WindowRule, bucket_attention
from reformer_dist.ops.lsh.reference import visible_pairs


def random_inputs(*shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax over the visible keys; the output of a query without any is its own value."""
    own = torch.eye(visible.shape[-1], dtype=torch.bool)
    visible = visible | (own & ~visible.any(-1, keepdim=True))
    scores = (scale * q @ k.transpose(-1, -2)).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("seq_len", [1, 2, 63, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_one_bucket_and_a_wide_window_is_exact_shared_qk_attention(seq_len: int, causal: bool) -> None:
    q, _, v = random_inputs(2, 3, seq_len, 8)
    k = torch.nn.functional.normalize(q, dim=-1)
    ids = torch.zeros(2, 3, 1, seq_len, dtype=torch.uint8)
    out = bucket_attention(q, k, v, ids, AttentionOptions(WindowRule(seq_len, causal), 1, scale=1.0))
    visible = ~torch.eye(seq_len, dtype=torch.bool)
    expected = dense(q, k, v, visible.tril() if causal else visible, 1.0)
    torch.testing.assert_close(out, expected)
    if causal:
        assert torch.equal(out[:, :, 0], v[:, :, 0])


@pytest.mark.parametrize("rule", [WindowRule(6, True), WindowRule(4, causal=False), ChunkRule(8, causal=True)])
def test_pairs_counted_once_is_softmax_over_the_union(rule: Rule) -> None:
    q, k, v = random_inputs(1, 2, 90, 8)
    ids = torch.randint(0, 4, (1, 2, 6, 90), generator=torch.Generator().manual_seed(1))
    options = AttentionOptions(rule, 4, scale=0.5, count_pairs_once=True)
    out = bucket_attention(q, k, v, ids, options)
    met_in_any = visible_pairs(ids, rule).sum(dim=2) > 0
    torch.testing.assert_close(out, dense(q, k, v, met_in_any, 0.5), atol=1e-5, rtol=1e-5)


def test_repeated_rounds_change_nothing() -> None:
    q, k, v = random_inputs(1, 2, 70, 8)
    one = torch.randint(0, 4, (1, 2, 1, 70), generator=torch.Generator().manual_seed(1))
    for once in (True, False):
        options = AttentionOptions(WindowRule(9, causal=True), 4, scale=0.5, count_pairs_once=once)
        alone = bucket_attention(q, k, v, one, options)
        together = bucket_attention(q, k, v, one.expand(1, 2, 5, 70), options)
        torch.testing.assert_close(alone, together, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 7, 32])
def test_local_attention_is_a_dense_band(causal: bool, window: int) -> None:
    q, k, v = random_inputs(2, 2, 77, 8)
    ids = torch.zeros(2, 2, 1, 77, dtype=torch.uint8)
    options = AttentionOptions(WindowRule(window, causal, sees_self=True), 1, scale=0.3)
    out = bucket_attention(q, k, v, ids, options)
    position = torch.arange(77)
    distance = position[:, None] - position[None, :]
    visible = (distance < window) & (distance > -window)
    torch.testing.assert_close(out, dense(q, k, v, visible.tril() if causal else visible, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [WindowRule(16, causal=True), ChunkRule(16, causal=True)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_rows_sum_to_one(dtype: torch.dtype, rule: Rule, scale: float) -> None:
    q, k, _ = (x.to(dtype) for x in random_inputs(1, 4, 500, 16))
    v = torch.ones(1, 4, 500, 16, dtype=dtype)
    ids = torch.randint(0, 8, (1, 4, 8, 500), generator=torch.Generator().manual_seed(1))
    out = bucket_attention(q, k, v, ids, AttentionOptions(rule, 8, scale)).float()
    ulp = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    assert (out - 1).abs().max() <= ulp


def test_large_logits_stay_finite() -> None:
    q, k, v = (100 * x for x in random_inputs(1, 1, 64, 8))
    ids = torch.zeros(1, 1, 2, 64, dtype=torch.uint8)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = bucket_attention(*leaves, ids, AttentionOptions(WindowRule(16, causal=True), 1, scale=1.0))
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.isfinite(x).all() for x in (out, *grads))


def test_a_prefix_has_the_outputs_of_the_full_sequence() -> None:
    """Incremental decoding relies on this. It holds to rounding, since tile sizes depend on the length."""
    q, k, v = random_inputs(1, 2, 700, 16)
    ids = torch.randint(0, 8, (1, 2, 4, 700), generator=torch.Generator().manual_seed(1))
    options = AttentionOptions(WindowRule(12, causal=True), 8, scale=0.5)
    whole = bucket_attention(q, k, v, ids, options)
    for length in (1, 2, 65, 399):
        part = bucket_attention(*(x[:, :, :length] for x in (q, k, v)), ids[..., :length], options)
        torch.testing.assert_close(part, whole[:, :, :length], atol=1e-5, rtol=1e-5)
