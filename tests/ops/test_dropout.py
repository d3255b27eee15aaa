"""Attention and token dropout: keep rate, what the mask depends on, and no use of global random state."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from reformer_dist.ops.dropout import TokenCoords, keep_mask, token_dropout, token_keys
from reformer_dist.ops.lsh import AttentionOptions, WindowRule, bucket_attention
from reformer_dist.seeds import derive_seed

COORDS = TokenCoords(rows=torch.tensor([3, 9, 0, 7, 5, 4]), positions=torch.arange(100, 140))


def mask(seed: int = 0, head: int = 0, round_: int = 0, n: int = 300, dropout: float = 0.5) -> Tensor:
    """Kept pairs [queries, keys] of one head and round."""
    positions, heads = torch.arange(n), torch.full((n,), head)
    query_keys, key_keys = (token_keys(heads, positions, round_, seed, is_query) for is_query in (True, False))
    return keep_mask(query_keys, key_keys, dropout)


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9])
def test_keep_rate(dropout: float) -> None:
    for seed in (0, 1, 2**40 + 7):
        kept = mask(seed, dropout=dropout).float()
        assert kept.mean().item() == pytest.approx(1 - dropout, abs=0.01)
        # the same for every query and key
        spread = (dropout * (1 - dropout) / 300) ** 0.5
        for axis in (0, 1):
            assert (kept.mean(axis) - 1 + dropout).abs().max().item() < 5 * spread


def test_masks_are_independent() -> None:
    masks = [mask(), mask(seed=derive_seed(1)), mask(seed=2**40), mask(head=1), mask(round_=1), mask().t()]
    for a, b in itertools.combinations(masks, 2):
        assert (a == b).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(mask(), mask())


def test_a_pair_keeps_its_mask_wherever_it_is_asked_for() -> None:
    whole = mask(seed=9, n=100)
    positions = torch.tensor([[17, 3], [99, 50]])
    heads = torch.zeros_like(positions)
    query_keys, key_keys = (token_keys(heads, positions, 0, 9, is_query) for is_query in (True, False))
    found = keep_mask(query_keys, key_keys, 0.5)
    assert torch.equal(found, whole[positions.unsqueeze(2), positions.unsqueeze(1)])


def test_expectation_of_attention_dropout_is_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 4, generator=generator) for _ in range(3))
    ids = torch.zeros(1, 2, 1, 40, dtype=torch.uint8)

    def attend(dropout: float, seed: int) -> Tensor:
        return bucket_attention(
            q, k, v, ids, AttentionOptions(WindowRule(8, True), 1, 1.0, dropout=dropout, dropout_seed=seed)
        )

    mean = torch.stack([attend(0.3, seed) for seed in range(600)]).mean(0)
    torch.testing.assert_close(mean, attend(0.0, 0), atol=0.2, rtol=0)
    assert torch.equal(attend(0.3, 1), attend(0.3, 1)) and not torch.equal(attend(0.3, 1), attend(0.3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_dropout(dtype: torch.dtype) -> None:
    x = torch.ones(6, 40, 500, dtype=dtype)
    state = torch.random.get_rng_state()
    out = token_dropout(x, 0.2, 3, COORDS)
    assert torch.equal(state, torch.random.get_rng_state())
    assert out.dtype == dtype and torch.equal(out, token_dropout(x, 0.2, 3, COORDS))
    assert not torch.equal(out, token_dropout(x, 0.2, 4, COORDS))
    assert (out == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert out.float().mean().item() == pytest.approx(1.0, abs=0.02)
    assert out.unique().numel() == 2


def test_a_tokens_mask_is_its_own() -> None:
    """Slices of rows and positions get the masks of the full tensor; rows, positions and channels differ."""
    x = torch.ones(6, 40, 64)
    whole = token_dropout(x, 0.5, 9, COORDS)
    for rows, positions in ((slice(2, 5), slice(0, 40)), (slice(5, 6), slice(7, 19))):
        assert COORDS.rows is not None
        coords = TokenCoords(COORDS.rows[rows], COORDS.positions[positions])
        assert torch.equal(token_dropout(x[rows, positions], 0.5, 9, coords), whole[rows, positions])
    for axis in range(3):
        first, second = whole.movedim(axis, 0)[:2]
        assert (first == second).float().mean().item() == pytest.approx(0.5, abs=0.06)


def test_no_dropout_is_the_input_itself() -> None:
    x = torch.ones(1, 3, 2)
    assert token_dropout(x, 0.0, 0, COORDS) is x
