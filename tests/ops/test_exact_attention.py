"""Exact attention against a dense softmax, and its dropout: what masks depend on, no global random state."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reformer_dist.ops.exact_attention import ExactOptions, exact_attention
from reformer_dist.seeds import derive_seed

OPTIONS = ExactOptions(causal=True, dropout=0.4, seed=2**40 + 7, rows=None)
FIRST_HEAD, N_HEADS = 2, 6


def inputs(*shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def dense_weights(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """[B, H, S, S]; a padded query attends to itself only."""
    batch, _, seq_len, head_dim = q.shape
    real = torch.ones(batch, seq_len, dtype=torch.bool) if mask is None else mask
    sees = (real.unsqueeze(2) & real.unsqueeze(1)) | torch.diag_embed(~real)
    if causal:
        sees = sees.tril()
    scores = q @ k.transpose(-1, -2) / head_dim**0.5
    return scores.masked_fill(~sees.unsqueeze(1), -torch.inf).softmax(-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: ExactOptions = OPTIONS) -> Tensor:
    return options.attend(q, k, v, mask, first_head=FIRST_HEAD, n_heads=N_HEADS)


def dropped_weights(q: Tensor, k: Tensor, mask: Tensor | None, options: ExactOptions = OPTIONS) -> Tensor:
    """[B, H, S, S]: with columns of the identity as values, the output is those columns of the weights."""
    seq_len, head_dim = q.shape[2:]
    columns = torch.eye(seq_len, seq_len + -seq_len % head_dim).split(head_dim, dim=1)
    weights = [attend(q, k, some.expand(*q.shape[:2], -1, -1), mask, options) for some in columns]
    return torch.cat(weights, dim=3)[..., :seq_len]


@settings(max_examples=60, deadline=None)
@given(
    seq_len=st.integers(1, 40),
    head_dim=st.integers(4, 12),
    causal=st.booleans(),
    padding=st.sampled_from(["none", "some", "row"]),
    dropout=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_a_dense_softmax(
    seq_len: int, head_dim: int, causal: bool, padding: str, dropout: float, seed: int
) -> None:
    """Outputs and gradients; with dropout, for the weights that it kept."""
    vectors = inputs(2, 3, seq_len, head_dim, seed=seed)
    mask = None
    if padding != "none":
        mask = torch.rand(2, seq_len, generator=torch.Generator().manual_seed(seed)) < 0.6
        mask[0] &= padding != "row"
    d_out = inputs(2, 3, seq_len, head_dim, seed=seed + 1)[0]
    options = replace(OPTIONS, causal=causal, dropout=dropout)
    factors = torch.ones(2, 3, seq_len, seq_len)
    if dropout > 0:
        factors = (dropped_weights(*vectors[:2], mask, options) > 0) / (1 - dropout)
    leaves = [x.clone().requires_grad_() for x in vectors]
    out = attend(*leaves, mask, options)
    wide = [x.double().requires_grad_() for x in vectors]
    right = (dense_weights(*wide[:2], causal, mask) * factors) @ wide[2]
    torch.testing.assert_close(out.double(), right, atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad(out, leaves, d_out)
    for found, grad in zip(grads, torch.autograd.grad(right, wide, d_out.double()), strict=True):
        torch.testing.assert_close(found.double(), grad, atol=1e-5, rtol=1e-5)


def test_a_padded_token_attends_to_itself_alone() -> None:
    q, k, v = inputs(2, 3, 20, 4)
    mask = torch.arange(20) % 3 > 0
    for causal in (True, False):
        out = exact_attention(q, k, v, causal=causal, key_padding_mask=mask.expand(2, -1))
        torch.testing.assert_close(out[:, :, ~mask], v[:, :, ~mask])
        # and no other token attends to it
        v_other = torch.where(mask.unsqueeze(1), v, 99.0)
        other = exact_attention(q, k, v_other, causal=causal, key_padding_mask=mask.expand(2, -1))
        assert torch.equal(out[:, :, mask], other[:, :, mask])


@pytest.mark.parametrize("dropout", [0.1, 0.4, 0.8])
def test_expectation_of_dropout(dropout: float) -> None:
    """Kept weights are scaled, so the mean over steps is the weight. All weights have the same keep rate.

    Seeds are derived as in training: consecutive numbers make the kernels' generators similar.
    """
    q, k, _ = inputs(1, 2, 12, 12)
    right = dense_weights(q, k, False, None)
    n_seeds = 200
    options = replace(OPTIONS, causal=False, dropout=dropout)
    seeds = [derive_seed("attention", step) for step in range(n_seeds)]
    drawn = torch.stack([dropped_weights(q, k, None, replace(options, seed=seed)) for seed in seeds])
    kept = drawn > 0
    torch.testing.assert_close(drawn, torch.where(kept, right / (1 - dropout), 0.0), atol=1e-6, rtol=1e-5)
    spread = (dropout * (1 - dropout)) ** 0.5
    assert kept.float().mean().item() == pytest.approx(1 - dropout, abs=5 * spread / kept.numel() ** 0.5)
    assert (kept.float().mean(0) - 1 + dropout).abs().max().item() < 5 * spread / n_seeds**0.5
    mean_error = (drawn.mean(0) - right) / right
    assert mean_error.abs().max().item() < 5 * spread / (1 - dropout) / n_seeds**0.5


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_block_of_rows_and_heads_matches_the_full_tensor(dropout: float, padded: bool) -> None:
    """Masks do not depend on which batch rows and heads are local."""
    q, k, v = inputs(4, N_HEADS, 30, 8)
    mask = torch.rand(4, 30, generator=torch.Generator().manual_seed(5)) < 0.7 if padded else None
    numbers = torch.tensor([3, 9, 0, 7])
    options = replace(OPTIONS, dropout=dropout, rows=numbers)
    whole = options.attend(q, k, v, mask, first_head=0, n_heads=N_HEADS)
    for first_row, last_row, first_head, last_head in ((0, 4, 2, 4), (1, 3, 0, 6), (3, 4, 5, 6), (2, 4, 0, 3)):
        rows, heads = slice(first_row, last_row), slice(first_head, last_head)
        its = replace(options, rows=numbers[rows])
        block = its.attend(
            *(x[rows, heads] for x in (q, k, v)),
            None if mask is None else mask[rows],
            first_head=first_head,
            n_heads=N_HEADS,
        )
        torch.testing.assert_close(block, whole[rows, heads], atol=1e-6, rtol=1e-6)


def test_masks_differ_by_head_and_seed() -> None:
    """Masks of the (row, head) pairs of a step are independent and reproducible."""
    zeros = torch.zeros(3, 4, 60, 30)
    options = replace(OPTIONS, causal=False, dropout=0.5)
    units = (dropped_weights(zeros, zeros, None, options) > 0).flatten(0, 1)
    again = (dropped_weights(zeros, zeros, None, options) > 0).flatten(0, 1)
    other = (dropped_weights(zeros, zeros, None, replace(options, seed=options.seed + 1)) > 0).flatten(0, 1)
    assert torch.equal(units, again)
    for a, b in itertools.combinations([*units, *other], 2):
        assert (a == b).float().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_any_seed_is_valid(seed: int) -> None:
    q, k, v = inputs(1, 2, 5, 4)
    assert attend(q, k, v, None, replace(OPTIONS, seed=seed)).isfinite().all()


def test_the_global_random_state_is_unchanged() -> None:
    leaves = [x.requires_grad_() for x in inputs(2, 3, 10, 4)]
    state = torch.random.get_rng_state()
    attend(*leaves, None).sum().backward()
    assert torch.equal(state, torch.random.get_rng_state())
