"""Decoding = forward: token-by-token logits match the whole forward at every position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from decoding_helpers import decoded_logits, left_padding, logits_and_margin, logits_of_steps
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from reformer_dist.config import (
    AttentionKind,
    CompatConfig,
    CrossAttentionKind,
    HashScheme,
    ModelConfig,
    NeighbourRule,
    Position,
)
from reformer_dist.models import ReformerEncoderDecoder, ReformerLM
from reformer_dist.models.base import ReformerModel
from reformer_dist.models.decoding import DecodingState

LSH, LOCAL, EXACT = AttentionKind.lsh, AttentionKind.local, AttentionKind.exact
Model = TypeVar("Model", bound=ReformerModel)
VOCAB = 40
ROUNDING = 1e-5
SIZES: dict[str, Any] = {
    "dim": 24,
    "n_layers": 3,
    "n_heads": 2,
    "layers": [LSH, LOCAL, EXACT],
    "n_hashes": 2,
    "n_buckets": 4,
    "window": 6,
    "local_window": 5,
    "axial_shape": [8, 16],
    "max_seq_len": 128,
    "ff_mult": 2,
}


def make_model(seed: int = 0, **changed: Any) -> ReformerLM:
    return strong(ReformerLM(ModelConfig(**{**SIZES, **changed}), VOCAB, seed).eval())


@torch.no_grad()
def strong(model: Model) -> Model:
    """Scales weights so that attention matters, which it hardly does at initialization; draws convolutions."""
    draw = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("_conv.weight"):
            torch.nn.init.normal_(weight, 0.0, 1.0, draw)
        if name.endswith(("to_out.weight", "head.weight")):
            weight.mul_(3)
    return model


def draw_tokens(batch: int, seq_len: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


@given(
    layers=st.sampled_from([[LSH], [LOCAL], [EXACT], [LSH, LOCAL], [LSH, LOCAL, EXACT]]),
    position=st.sampled_from(list(Position)),
    hash_scheme=st.sampled_from(list(HashScheme)),
    flags=st.fixed_dictionaries(
        {name: st.booleans() for name in ("local_round", "count_pairs_once", "shared_qk")}
    ),
    n_hashes=st.integers(1, 3),
    next_value_heads=st.sampled_from([0, 1, 2]),
    qk_conv=st.sampled_from([0, 2, 5]),
    lengths=st.lists(st.integers(26, 40), min_size=1, max_size=3),
    n_prompt=st.integers(16, 25),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_decoding_is_the_forward(
    layers: list[Any],
    position: Position,
    hash_scheme: HashScheme,
    flags: dict[str, Any],
    n_hashes: int,
    next_value_heads: int,
    qk_conv: int,
    lengths: list[int],
    n_prompt: int,
    seed: int,
) -> None:
    flags = {**flags, "next_value_heads": next_value_heads if LSH in layers else 0, "qk_conv": qk_conv}
    model = make_model(seed, layers=layers, position=position, hash_scheme=hash_scheme, n_hashes=n_hashes, **flags)
    seq_len = max(lengths)
    tokens, mask = draw_tokens(len(lengths), seq_len, seed), left_padding(lengths, seq_len)
    whole, margin = logits_and_margin(model, tokens, mask)
    assume(margin > ROUNDING)
    found = decoded_logits(model, tokens, n_prompt, mask)
    torch.testing.assert_close(found[mask], whole[mask], atol=ROUNDING, rtol=0)
    # left padding is equivalent to none
    shortest = min(range(len(lengths)), key=lambda row: lengths[row])
    alone = decoded_logits(model, tokens[shortest : shortest + 1, seq_len - lengths[shortest] :], 3)
    torch.testing.assert_close(alone[0], whole[shortest][mask[shortest]], atol=ROUNDING, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_hashes", "position"),
    [(n_hashes, Position.axial) for n_hashes in (1, 4, 8)]
    + [(4, position) for position in Position if position is not Position.axial],
)
def test_a_thousand_tokens(n_hashes: int, position: Position) -> None:
    """Three rows of different lengths, LSH, local and exact layers, from the first token on."""
    model = make_model(
        layers=[LSH, LOCAL, LSH, EXACT],
        n_layers=4,
        n_hashes=n_hashes,
        n_buckets=16,
        window=32,
        local_window=48,
        axial_shape=[25, 40],
        max_seq_len=1000,
        position=position,
    )
    mask = left_padding([1000, 941, 703], 1000)
    tokens, whole = clear_text(model, mask)
    found = decoded_logits(model, tokens, 298, mask)
    torch.testing.assert_close(found[mask], whole[mask], atol=ROUNDING, rtol=0)
    alone = decoded_logits(model, tokens[:1], 1)
    torch.testing.assert_close(alone[0], whole[0], atol=ROUNDING, rtol=0)


def clear_text(model: Callable[..., Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first random text without a token at a bucket boundary, and its logits."""
    for seed in range(20):
        tokens = draw_tokens(*mask.shape, seed)
        whole, margin = logits_and_margin(model, tokens, mask)
        if margin > ROUNDING / 2:
            return tokens, whole
    pytest.fail("no text without a token at a bucket boundary")


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", [CrossAttentionKind.lsh, pytest.param(CrossAttentionKind.exact, marks=pytest.mark.slow)]
)
def test_a_thousand_tokens_of_an_encoder_decoder(kind: CrossAttentionKind) -> None:
    """Three targets of different lengths; sources padded on the right, on the left, and not at all."""
    kinds = [LSH, LOCAL, EXACT]
    sizes = {"layers": kinds, "encoder_layers": kinds, "cross_attention": kind, "qk_conv": 3}
    spans = {"n_hashes": 4, "n_buckets": 16, "window": 32, "local_window": 48, "axial_shape": [25, 40]}
    model = strong(ReformerEncoderDecoder(ModelConfig(**{**SIZES, **sizes, **spans}), VOCAB).eval())
    source_mask = left_padding([150, 110, 150], 150)
    source_mask[0, 97:] = False
    reader = model.conditioned_on(draw_tokens(3, 150, 100), source_mask)
    mask = left_padding([1000, 941, 703], 1000)
    tokens, whole = clear_text(reader, mask)
    found = logits_of_steps(reader, DecodingState(model.config), tokens, 298, mask)
    torch.testing.assert_close(found[mask], whole[mask], atol=ROUNDING, rtol=0)


def test_bfloat16_weights() -> None:
    """One bucket only, since rounding in products of other shapes changes buckets of bfloat16 queries."""
    model = make_model(n_buckets=1).bfloat16()
    tokens, mask = draw_tokens(2, 40, 0), left_padding([40, 31], 40)
    with torch.no_grad():
        whole = model(tokens, key_padding_mask=mask)
    found = decoded_logits(model, tokens, 12, mask)
    assert (found[mask] - whole[mask]).abs().mean() < 0.01 * whole[mask].std()


def test_rows_share_a_prompt_and_diverge() -> None:
    model = make_model(qk_conv=3)
    tokens = draw_tokens(1, 50, 5).repeat(3, 1)
    tokens[:, 30:] = draw_tokens(3, 20, 6)
    whole, margin = logits_and_margin(model, tokens)
    assert margin > ROUNDING
    with torch.no_grad():
        state = DecodingState(model.config)
        model(tokens[:1, :30], sequence=state)
        state.select_rows(torch.zeros(3, dtype=torch.int64))
        found = torch.cat([model(token, sequence=state) for token in tokens[:, 30:40].split(1, 1)], dim=1)
        torch.testing.assert_close(found, whole[:, 30:40], atol=ROUNDING, rtol=0)
        state.select_rows(torch.tensor([2, 0]))
        found = torch.cat([model(token, sequence=state) for token in tokens[[2, 0], 40:].split(1, 1)], dim=1)
        torch.testing.assert_close(found, whole[[2, 0], 40:], atol=ROUNDING, rtol=0)


@torch.no_grad()
def test_dropped_rows_do_not_limit_the_positions_of_others() -> None:
    model, tokens = make_model(axial_shape=[4, 5]), draw_tokens(2, 23, 0)
    state = DecodingState(model.config)
    model(tokens[:, :20], key_padding_mask=left_padding([20, 17], 20), sequence=state)
    state.select_rows(torch.tensor([1]))
    for token in tokens[1:, 20:].split(1, dim=1):
        model(token, sequence=state)
    with pytest.raises(ValueError, match=r"positions.*\b20\b"):
        model(tokens[1:, :1], sequence=state)


@torch.no_grad()
def test_only_the_last_logits() -> None:
    model, tokens = make_model(), draw_tokens(2, 20, 0)
    torch.testing.assert_close(model(tokens, logits_to_keep=3), model(tokens)[:, -3:], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"causal": False}, "model.causal"),
        ({"neighbours": NeighbourRule.chunk}, "model.neighbours"),
        ({"compat": CompatConfig(local_chunk_len=8)}, "model.compat.local_chunk_len"),
    ],
    ids=str,
)
def test_models_without_a_kv_cache_are_refused(changed: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        DecodingState(make_model(**changed).config)
    # without LSH layers, their neighbour rule has no effect
    DecodingState(make_model(layers=[LOCAL], neighbours=NeighbourRule.chunk).config)


@torch.no_grad()
def test_misuse_is_refused() -> None:
    model, tokens = make_model(axial_shape=[4, 5]), draw_tokens(2, 20, 0)
    behind = left_padding([20, 15], 20).flip(1)
    with pytest.raises(ValueError, match="padding"):
        model(tokens, key_padding_mask=behind, sequence=DecodingState(model.config))
    state = DecodingState(model.config)
    model(tokens[:, :18], sequence=state)
    with pytest.raises(ValueError, match=r"\b2 tokens"):
        model(tokens[:, 18:], sequence=state)
    model(tokens[:, 18:19], sequence=state)
    model(tokens[:, 19:], sequence=state)
    with pytest.raises(ValueError, match=r"positions.*\b20\b"):
        model(tokens[:, :1], sequence=state)
    noisy = make_model(attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="eval"):
        noisy(tokens[:, :5], sequence=DecodingState(noisy.config))
