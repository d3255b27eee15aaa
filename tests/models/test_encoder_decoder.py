"""Encoder-decoder: gradients, a single encoder pass, padding, causality, and decoding with KV caches."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from model_helpers import EXACT, LOCAL, LSH, SMALL, VOCAB, assert_grads_agree, grads_of, random_tokens, shifted
from torch import Tensor

from reformer_dist.config import CrossAttentionKind, ModelConfig, Norm, Position, Recompute
from reformer_dist.errors import ConfigError
from reformer_dist.models import ReformerEncoderDecoder
from reformer_dist.models.block import Block
from reformer_dist.models.decoding import DecodingState

DROPOUTS = {"dropout": 0.1, "attention_dropout": 0.2, "ff_dropout": 0.3}
KINDS = list(CrossAttentionKind)
CHANGES: list[dict[str, Any]] = [
    {},
    {"cross_attention": CrossAttentionKind.lsh},
    {"cross_attention": CrossAttentionKind.lsh, "count_pairs_once": True, **DROPOUTS},
    {"layers": [EXACT], "encoder_layers": [LSH, LOCAL], **DROPOUTS},
    {"share_layers": True, "tie_embeddings": True, "n_encoder_layers": 4, "position": Position.rotary},
    {"layer_drop": 0.5, "norm": Norm.scale, "embedding_dim": 10, "n_layers": 4},
    {"position": Position.sinusoidal, "ff_chunk": 7, "n_layers": 1, "n_encoder_layers": 1},
]


def small(seed: int = 0, **changed: Any) -> ReformerEncoderDecoder:
    config = ModelConfig(**{**SMALL, "n_encoder_layers": 3, "encoder_layers": [EXACT, LSH, LOCAL], **changed})
    return ReformerEncoderDecoder(config, VOCAB, seed)


def again(model: ReformerEncoderDecoder, **changed: Any) -> ReformerEncoderDecoder:
    """A copy of the weights under another config."""
    other = ReformerEncoderDecoder(dataclasses.replace(model.config, **changed), VOCAB, model.seed)
    other.load_state_dict(model.state_dict())
    return other


def masks(batch: int, source_len: int, target_len: int) -> dict[str, Tensor]:
    """One source padded on the right, one on the left, and a target padded on the right."""
    source_mask = torch.ones(batch, source_len, dtype=torch.bool)
    source_mask[0, source_len // 2 + 1 :] = False
    source_mask[1, : source_len // 3] = False
    target_mask = torch.ones(batch, target_len, dtype=torch.bool)
    target_mask[1, target_len // 2 + 1 :] = False
    return {"source_mask": source_mask, "key_padding_mask": target_mask}


def run(model: ReformerEncoderDecoder, source: Tensor, tokens: Tensor, **options: Any) -> Tensor:
    loss = model(source, tokens, shifted(tokens), step=3, dropout_seed=5, **options)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("changed", CHANGES, ids=str)
def test_three_ways_of_backward_agree(changed: dict[str, Any]) -> None:
    for seed, (source_len, target_len) in enumerate([(21, 17), (2, 33), (40, 3)]):
        plain = small(seed, recompute=Recompute.none, **changed)
        source, tokens = random_tokens(3, source_len, seed), random_tokens(3, target_len, seed + 1)
        given = masks(3, source_len, target_len) if seed != 1 else {}
        expected = run(plain, source, tokens, **given)
        for recompute, tolerance in ((Recompute.reversible, 1e-5), (Recompute.checkpoint, 0.0)):
            model = again(plain, recompute=recompute)
            assert torch.equal(run(model, source, tokens, **given), expected)
            assert grads_of(plain).keys() == {name for name, _ in plain.named_parameters()}
            assert_grads_agree(model, plain, tolerance)


def test_two_forwards_before_a_backward() -> None:
    plain = small(recompute=Recompute.none, **DROPOUTS)
    model = again(plain, recompute=Recompute.reversible)
    pairs = [(random_tokens(2, 19, seed), random_tokens(2, 23, seed + 5)) for seed in (0, 1)]
    for source, tokens in pairs:
        run(plain, source, tokens)
    losses = [model(source, tokens, shifted(tokens), step=3, dropout_seed=5) for source, tokens in pairs]
    for loss in losses:
        loss.backward()
    assert grads_of(plain).keys() == {name for name, _ in plain.named_parameters()}
    assert_grads_agree(model, plain, 1e-5)


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("recompute", [Recompute.reversible, Recompute.checkpoint])
def test_the_encoder_runs_once_forward_and_once_backward(
    depth: int, recompute: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each encoder block calls its attention once in forward and once in backward, at any decoder depth."""
    model = small(n_layers=depth, recompute=recompute)
    calls = {"encoder": 0, "decoder": 0, "through": 0}
    for name, stack in (("encoder", model.encoder), ("decoder", model.stack)):
        for block in stack.blocks:
            assert isinstance(block, Block)
            block.attention.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    model.encoder.norm.weight.register_hook(lambda _: calls.update(through=calls["through"] + 1))
    source, tokens = random_tokens(2, 21), random_tokens(2, 17)
    loss = model(source, tokens, shifted(tokens))
    assert calls == {"encoder": 3, "decoder": depth, "through": 0}
    loss.backward()
    assert calls == {"encoder": 6, "decoder": 2 * depth, "through": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: CrossAttentionKind) -> None:
    """On either side of source and target."""
    model = small(cross_attention=kind).eval()
    source, tokens = random_tokens(1, 13), random_tokens(1, 11, seed=1)
    right = model(source, tokens)
    for source_before, source_behind, before, behind in ((0, 9, 0, 5), (4, 0, 6, 0), (3, 8, 0, 2)):
        wide_source = torch.nn.functional.pad(source, (source_before, source_behind), value=7)
        wide = torch.nn.functional.pad(tokens, (before, behind), value=9)
        source_mask, mask = torch.zeros_like(wide_source).bool(), torch.zeros_like(wide).bool()
        source_mask[:, source_before : source_before + 13] = True
        mask[:, before : before + 11] = True
        found = model(wide_source, wide, source_mask=source_mask, key_padding_mask=mask)
        assert (found[:, before : before + 11] - right).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_causal_and_attends_to_the_whole_source(kind: CrossAttentionKind) -> None:
    model = small(cross_attention=kind, layers=[LSH, LOCAL], window=64, n_buckets=2).eval()
    source, tokens = random_tokens(1, 40), random_tokens(1, 33, seed=1)
    right = model(source, tokens)
    edited = tokens.clone()
    edited[:, 20:] = (edited[:, 20:] + 1) % VOCAB
    assert torch.equal(model(source, edited)[:, :20], right[:, :20])
    for place in (0, 39):
        other = source.clone()
        other[:, place] = (other[:, place] + 1) % VOCAB
        assert (model(other, tokens)[:, 0] - right[:, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_hashes", [1, 4, 8])
def test_decoding_is_forward(kind: CrossAttentionKind, n_hashes: int) -> None:
    """Token by token after prompts of different lengths; the encoder and the source keys are computed once."""
    model = small(
        cross_attention=kind, n_hashes=n_hashes, layers=[LSH, LOCAL, EXACT], n_layers=3, axial_shape=[8, 16]
    ).eval()
    n_keys = 0

    def count(*_: Any) -> None:
        nonlocal n_keys
        n_keys += 1

    for block in model.stack.blocks:
        assert isinstance(block, Block)
        block.cross_attention.to_k.register_forward_hook(count)
    source, tokens = random_tokens(3, 25), random_tokens(3, 60, seed=1)
    source_mask = masks(3, 25, 60)["source_mask"]
    mask = torch.ones(3, 60, dtype=torch.bool)
    mask[0, :4], mask[1, :1] = False, False
    with torch.no_grad():
        right = model(source, tokens, source_mask=source_mask, key_padding_mask=mask)
        n_keys = 0
        reader, state = model.conditioned_on(source, source_mask), DecodingState(model.config)
        found = [reader(tokens[:, :6], key_padding_mask=mask[:, :6], sequence=state)]
        found += [reader(tokens[:, place : place + 1], sequence=state) for place in range(6, 60)]
        assert n_keys == len(model.stack.blocks)
        differences = (torch.cat(found, dim=1) - right).abs()[mask]
        assert differences.max() <= 1e-5
        # rows are reordered, as in a beam search
        rows = torch.tensor([2, 0, 2])
        state.select_rows(rows)
        step = reader(tokens[rows, -1:], sequence=state)
        alone = model(
            source[rows],
            torch.cat([tokens, tokens[:, -1:]], dim=1)[rows],
            source_mask=source_mask[rows],
            key_padding_mask=torch.nn.functional.pad(mask, (0, 1), value=True)[rows],
        )
        assert (step[:, -1] - alone[:, -1]).abs().max() <= 1e-5


def test_rezero_starts_as_the_identity_in_every_sublayer() -> None:
    model = small(norm=Norm.rezero).eval()
    source, tokens = random_tokens(2, 21), random_tokens(2, 17)
    with torch.no_grad():
        embedded = model.embedding(tokens, torch.arange(17))
        torch.testing.assert_close(model(source, tokens), model.head(model.stack.norm(embedded), None))
        torch.testing.assert_close(
            model.encode(source), model.encoder.norm(model.embedding(source, torch.arange(21)))
        )


def test_a_step_that_skips_the_whole_decoder_has_a_gradient_for_every_weight() -> None:
    model = small(layer_drop=0.5)
    for block in model.stack.blocks:
        assert isinstance(block, Block)
        block.layer_drop = 1.0
    run(model, random_tokens(2, 21), random_tokens(2, 17))
    assert grads_of(model).keys() == {name for name, _ in model.named_parameters()}
    assert not any(grad.any() for name, grad in grads_of(model).items() if name.startswith("encoder."))


def test_bf16_is_close_to_float32() -> None:
    # without LSH, where rounding a vector changes its bucket
    plain = small(recompute=Recompute.none, layers=[LOCAL, EXACT], encoder_layers=[LOCAL, EXACT])
    source, tokens = random_tokens(2, 21), random_tokens(2, 17)
    expected = run(plain, source, tokens)
    for recompute in (Recompute.reversible, Recompute.none):
        model = again(plain, recompute=recompute).bfloat16()
        assert run(model, source, tokens).item() == pytest.approx(expected.item(), rel=0.01)
        for name, grad in grads_of(model).items():
            right = plain.get_parameter(name).grad
            assert right is not None
            assert (grad.float() - right).norm() <= 0.1 * right.norm() + 0.02, name


def test_reversible_drift_is_that_of_the_worse_stack() -> None:
    """A layer recomputed with other masks or rotations than in forward would not be reconstructed."""
    model = small(cross_attention=CrossAttentionKind.lsh)
    source, tokens = random_tokens(3, 21), random_tokens(3, 17)
    given = masks(3, 21, 17)
    drift = model.reversible_drift(source, tokens, **given)
    assert 0 < drift < 1e-5
    for stack in (model.encoder, model.stack):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stack, "reversible_drift", lambda x, context: x.new_tensor(7.0))
            assert model.reversible_drift(source, tokens, **given) == 7


def test_an_empty_source_contributes_nothing() -> None:
    model = small().eval()
    source, tokens = random_tokens(2, 9), random_tokens(2, 7)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0] = False
    out = model(source, tokens, source_mask=mask)
    assert out.isfinite().all()
    changed = model((source + 1) % VOCAB, tokens, source_mask=mask)
    assert torch.equal(out[0], changed[0]) and not torch.equal(out[1], changed[1])


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"model\.causal"):
        small(causal=False)
    with pytest.raises(ConfigError, match=r"model\.n_encoder_layers=0"):
        small(n_encoder_layers=0)
    with pytest.raises(ConfigError, match=r"model\.encoder_layers"):
        small(encoder_layers=[])


def test_the_encoder_of_a_language_models_config_is_bidirectional() -> None:
    config = ModelConfig(**SMALL)
    encoder = config.encoder()
    assert (encoder.causal, encoder.n_layers, encoder.layers) == (False, config.n_layers, config.layers)
