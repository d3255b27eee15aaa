"""Logits of a trained causal model are bitwise independent of later tokens; a bidirectional model's are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import EXACT, LOCAL, LSH, random_tokens, small_model, source_bytes, train

from reformer_dist.config import HashScheme, NeighbourRule, Position
from reformer_dist.models import ReformerLM

SEQ_LEN = 500
SIZES: dict[str, Any] = {"dim": 32, "n_heads": 2, "n_buckets": 8, "window": 16, "axial_shape": [16, 32]}


def trained_model(**changed: Any) -> ReformerLM:
    model = small_model(256, **{**SIZES, **changed})
    losses = train(model, steps=20, seq_len=SEQ_LEN)
    assert losses[-1] < losses[0] - 0.5
    return model.eval()


@torch.no_grad()
def largest_leak(model: ReformerLM) -> float:
    """Largest change of a logit before t when tokens from t on change, over several t."""
    tokens = source_bytes()[-SEQ_LEN:].unsqueeze(0)
    logits = model(tokens)
    leak = 0.0
    for t in (1, 17, 128, 250, 251, SEQ_LEN - 1):
        for new in (tokens.flip(1), torch.full_like(tokens, 32), random_tokens(1, SEQ_LEN, t, 256)):
            edited = torch.cat([tokens[:, :t], new[:, t:]], dim=1)
            after = model(edited)
            leak = max(leak, (after[:, :t] - logits[:, :t]).abs().max().item())
            assert not torch.equal(after[:, t:], logits[:, t:])
    return leak


@pytest.mark.parametrize(
    "changed",
    [
        {"layers": [LOCAL, LSH]},
        {"layers": [LSH], "local_round": True, "count_pairs_once": True},
        {"layers": [LSH], "hash_scheme": HashScheme.floor, "position": Position.rotary},
        {"layers": [LSH, EXACT]},
        {"layers": [LOCAL, LSH], "next_value_heads": 1},
        {"layers": [LSH], "next_value_heads": 2, "local_round": True},
        {"layers": [LOCAL, LSH], "shared_qk": False, "local_round": True, "count_pairs_once": True},
        {"layers": [LSH], "shared_qk": False, "next_value_heads": 1, "position": Position.rotary},
        {"layers": [LOCAL, LSH], "qk_conv": 3, "next_value_heads": 1},
        {"layers": [LSH], "qk_conv": 8, "shared_qk": False, "local_round": True},
    ],
    ids=str,
)
def test_window_rule_is_strictly_causal(changed: dict[str, Any]) -> None:
    assert largest_leak(trained_model(**changed)) == 0.0


def test_chunk_rule_leaks() -> None:
    assert largest_leak(trained_model(layers=[LOCAL, LSH], neighbours=NeighbourRule.chunk, chunk_len=16)) > 1e-3


@pytest.mark.parametrize("layers", [[LOCAL], [LSH], [EXACT]], ids=str)
def test_a_bidirectional_model_attends_to_later_tokens(layers: list[Any]) -> None:
    model = small_model(layers=layers, causal=False).eval()
    tokens = random_tokens()
    edited = tokens.clone()
    edited[:, -1] = (edited[:, -1] + 1) % 50
    with torch.no_grad():
        changed = (model(tokens) != model(edited)).any(-1)
    assert changed[:, :-1].any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layers", [[LOCAL], [LSH], [EXACT], [LSH, EXACT, LOCAL]], ids=str)
@pytest.mark.parametrize("neighbours", list(NeighbourRule))
@pytest.mark.parametrize("next_value_heads", [0, 1])
@torch.no_grad()
def test_padding_does_not_matter(
    causal: bool, layers: list[Any], neighbours: NeighbourRule, next_value_heads: int
) -> None:
    heads = next_value_heads if LSH in layers else 0
    options = {"next_value_heads": heads, "qk_conv": 3 if causal and heads else 0}
    model = small_model(layers=layers, causal=causal, neighbours=neighbours, **options).eval()
    tokens = random_tokens(2, 60)
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[0, 41:] = False
    mask[1, :9] = False
    logits = model(tokens, key_padding_mask=mask)
    other = torch.where(mask, tokens, (tokens + 7) % 50)
    assert torch.equal(model(other, key_padding_mask=mask)[mask], logits[mask])
    # padding on the right is equivalent to a shorter row
    alone = model(tokens[:1, :41])
    torch.testing.assert_close(alone, logits[:1, :41], atol=1e-4, rtol=1e-4)
