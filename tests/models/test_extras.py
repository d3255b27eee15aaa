"""Norms, factorized embeddings, layer drop, shared value heads, short convolutions, and attention inspection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from model_helpers import EXACT, LOCAL, LSH, VOCAB, grads_of, random_tokens, shifted, small_model
from torch import Tensor

from reformer_dist import ReformerForSequenceClassification, init_weights, inspect_attention
from reformer_dist.config import Activation, NeighbourRule, Norm, Position, Recompute
from reformer_dist.models.norms import ReZero, RMSNorm, ScaleNorm, StreamNorm
from reformer_dist.models.short_conv import ShortConv
from reformer_dist.seeds import derive_seed

DROPOUTS = {"dropout": 0.1, "attention_dropout": 0.2, "ff_dropout": 0.3}


def test_scale_norm() -> None:
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(ScaleNorm(24, 1e-5)(x), 24**0.5 * x / x.norm(dim=-1, keepdim=True))
    assert ScaleNorm(24, 1e-5).bfloat16()(x).dtype == torch.bfloat16
    assert torch.equal(ScaleNorm(24, 1e-5)(torch.zeros(1, 24)), torch.zeros(1, 24))
    norm = ScaleNorm(24, 1e-5)
    norm.weight.data.fill_(3.0)
    torch.testing.assert_close(norm(x).norm(dim=-1), torch.full((2, 5), 3.0))


def test_rms_norm() -> None:
    x = torch.randn(2, 5, 24)
    norm = RMSNorm(24, 1e-5)
    norm.weight.data.uniform_(0.5, 1.5)
    torch.testing.assert_close(norm(x), norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    assert norm.bfloat16()(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("norm", "kind"),
    [(Norm.layer, StreamNorm), (Norm.rms, RMSNorm), (Norm.scale, ScaleNorm), (Norm.rezero, ReZero)],
)
def test_every_sublayer_has_the_configured_norm(norm: Norm, kind: type) -> None:
    stack = small_model(norm=norm).stack
    for block in stack.blocks:
        assert type(block.attention_norm) is type(block.feed_forward_norm) is kind
    assert type(stack.norm) is (RMSNorm if norm is Norm.rms else StreamNorm)


@pytest.mark.parametrize(
    ("activation", "function", "is_gated"),
    [
        (Activation.gelu, F.gelu, False),
        (Activation.relu, F.relu, False),
        (Activation.silu, F.silu, False),
        (Activation.glu, F.gelu, True),
        (Activation.swiglu, F.silu, True),
    ],
)
def test_activations(activation: Activation, function: Callable[[Tensor], Tensor], is_gated: bool) -> None:
    model = small_model(activation=activation).eval()
    layer = model.stack.blocks[0].feed_forward
    x = torch.randn(2, 5, layer.to_out.out_features)
    inner = layer.to_inner(x)
    if is_gated:
        value, gate = inner.chunk(2, dim=-1)
        expected = layer.to_out(value * function(gate))
    else:
        expected = layer.to_out(function(inner))
    context, coords = model._evaluation_context(random_tokens()[:, :5], {}), None
    torch.testing.assert_close(layer(x, context, 0, coords), expected)


def test_rezero_starts_as_the_identity() -> None:
    model = small_model(norm=Norm.rezero).eval()
    with torch.no_grad():
        embedded = model.embedding(random_tokens(), torch.arange(37))
        torch.testing.assert_close(model.encode(random_tokens()), model.stack.norm(embedded))


@pytest.mark.parametrize("recompute", [Recompute.reversible, Recompute.checkpoint])
def test_rezero_has_the_gradients_of_plain_autograd(recompute: Recompute) -> None:
    found = []
    for each in (Recompute.none, recompute):
        model = small_model(norm=Norm.rezero, recompute=each, **DROPOUTS)
        for module in model.modules():
            if isinstance(module, ReZero):
                module.weight.data.fill_(0.4)  # at 0, sublayers have no gradients to compare
        model(random_tokens(), shifted(random_tokens()), step=0, dropout_seed=1).backward()
        found.append(grads_of(model))
    assert len(found[0]) == len(found[1]) == len(list(model.parameters()))
    largest = max(grad.norm() for grad in found[0].values())
    for name, expected in found[0].items():
        error = (found[1][name] - expected).norm()
        assert expected.norm() > 0 and error <= 1e-5 * (expected.norm() + 0.01 * largest), name


@torch.no_grad()
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("position", list(Position))
def test_a_narrow_embedding(tie: bool, position: Position) -> None:
    model = small_model(embedding_dim=10, tie_embeddings=tie, position=position, max_seq_len=40).eval()
    assert model.embedding.tokens.weight.shape == model.head.weight.shape == (VOCAB, 10)
    logits, labels = model(random_tokens()), shifted(random_tokens())
    assert logits.shape == (2, 37, VOCAB)
    expected = F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
    torch.testing.assert_close(model(random_tokens(), labels), expected)
    if tie:  # initial logits have the scale of the head's input, whatever the model's width
        assert model.head.weight.norm(dim=1).mean() == pytest.approx(1.0, abs=0.15)
    assert model.embedding(random_tokens(), torch.arange(37)).std() == pytest.approx(1.4, abs=0.4)


@torch.no_grad()
def test_a_narrow_embedding_is_projected_with_biases() -> None:
    """The biases start at 0, so a model without them would be the same initially."""
    model = small_model(embedding_dim=10, position=Position.rotary).eval()
    assert model.embedding.to_dim is not None and model.head.to_table is not None
    for layer in (model.embedding.to_dim, model.head.to_table):
        layer.bias.fill_(0.5)
    vectors = model.embedding.tokens(random_tokens())
    embedded = model.embedding(random_tokens(), torch.arange(37))
    torch.testing.assert_close(embedded, model.embedding.to_dim(vectors))
    hidden = model.encode(random_tokens())
    expected = F.linear(model.head.to_table(hidden), model.head.weight, model.head.bias)
    torch.testing.assert_close(model(random_tokens()), expected)


@torch.no_grad()
@pytest.mark.parametrize("shared_qk", [True, False])
def test_short_convolutions_start_as_the_identity(shared_qk: bool) -> None:
    plain = small_model(shared_qk=shared_qk).eval()
    model = small_model(shared_qk=shared_qk, qk_conv=3).eval()  # with random convolutions
    assert not torch.allclose(model(random_tokens()), plain(random_tokens()))
    init_weights(model, model.config, seed=0)
    assert torch.equal(model(random_tokens()), plain(random_tokens()))
    convs = [module for module in model.modules() if isinstance(module, ShortConv)]
    assert [conv.weight.tolist() for conv in convs] == [[[1.0] * 24, [0.0] * 24, [0.0] * 24]] * len(convs)
    assert len(convs) == (2 if shared_qk else 4)  # of two LSH layers


@torch.no_grad()
@pytest.mark.parametrize("kind", [LSH, LOCAL, EXACT], ids=lambda kind: kind.name)
def test_one_value_head_is_the_same_values_for_all(kind: object) -> None:
    shared = small_model(layers=[kind], one_value_head=True).eval()
    own = small_model(layers=[kind]).eval()
    weights = shared.state_dict()
    for name, weight in weights.items():
        if name.endswith("to_v.weight"):
            assert weight.shape == (8, 24)
            weights[name] = weight.repeat(3, 1)
    own.load_state_dict(weights)
    torch.testing.assert_close(shared(random_tokens()), own(random_tokens()))


def test_layer_drop_is_a_function_of_seed_and_layer() -> None:
    model = small_model(layers=[LOCAL], n_layers=6, layer_drop=0.4)
    counts: Counter[str] = Counter()
    for seed in range(40):
        torch.manual_seed(seed % 3)  # must not matter
        model.zero_grad()
        model(random_tokens(), shifted(random_tokens()), step=seed, dropout_seed=seed).backward()
        # a skipped layer has gradients, which are zero
        skipped = [i for i, block in enumerate(model.stack.blocks) if not block.attention.to_v.weight.grad.any()]
        assert len(grads_of(model)) == len(list(model.parameters()))
        counts.update(skipped)
        assert skipped == [i for i in range(6) if _is_skipped(seed, i, 0.4)]
    assert len(counts) == 6 and sum(counts.values()) == pytest.approx(0.4 * 240, abs=25)


def _is_skipped(seed: int, layer: int, p: float) -> bool:
    return derive_seed("dropout", seed, "layer_drop", layer) / 2**63 < p


@torch.no_grad()
def test_layer_drop_is_for_training_only_and_keeps_streams() -> None:
    model = small_model(layer_drop=0.5)
    without = small_model()
    assert torch.equal(model.eval()(random_tokens()), without.eval()(random_tokens()))
    for block in model.stack.blocks:
        block.layer_drop = 1.0
    embedded = model.embedding(random_tokens(), torch.arange(37))
    out = model.train().encode(random_tokens(), dropout_seed=1)
    assert torch.equal(out, model.stack.norm(embedded))


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_inspected_attention(causal: bool) -> None:
    model = small_model(layers=[LSH, LOCAL, EXACT], n_layers=3, causal=causal, local_round=True).eval()
    tokens = random_tokens(2, 50)
    mask = torch.arange(50) < torch.tensor([[50], [40]])
    expected = model(tokens, key_padding_mask=mask)
    views = inspect_attention(model.train(), tokens, key_padding_mask=mask)
    assert model.training and torch.equal(model.eval()(tokens, key_padding_mask=mask), expected)
    assert [view.bucket_ids is None for view in views] == [False, True, True]
    assert views[0].bucket_ids.shape == (2, 3, 3, 50)
    for view in views:
        assert view.weights.shape == (2, 3, 50, 50)
        torch.testing.assert_close(view.weights.sum(dim=-1), torch.ones(2, 3, 50))
        assert not view.weights[1, :, :40, 40:].any()  # no query attends to padding
        if causal:
            assert not view.weights.triu(1).any()
    # without a local round, every key shares a bucket with its query in some round
    model = small_model(layers=[LSH], n_layers=1, causal=causal).eval()
    (view,) = inspect_attention(model, tokens)
    ids = view.bucket_ids.long()
    meets = (ids.unsqueeze(-1) == ids.unsqueeze(-2)).any(dim=2)
    assert not view.weights[~meets].any() and view.weights[meets].any()


@torch.no_grad()
def test_inspected_weights_reproduce_the_output() -> None:
    config = small_model(layers=[LSH], n_layers=1, neighbours=NeighbourRule.chunk).config
    model = ReformerForSequenceClassification(config, VOCAB, 3).eval()
    tokens = random_tokens(2, 45)
    outs = []
    hook = model.stack.blocks[0].attention.to_out.register_forward_pre_hook(
        lambda _m, inputs: outs.append(inputs[0])
    )
    values = []
    model.stack.blocks[0].attention.to_v.register_forward_hook(lambda _m, _i, output: values.append(output))
    (view,) = inspect_attention(model, tokens)
    hook.remove()
    v = values[0].view(2, 45, 3, 8).transpose(1, 2)
    torch.testing.assert_close((view.weights @ v).transpose(1, 2).flatten(2), outs[0])


def test_long_inputs_are_not_inspected() -> None:
    with pytest.raises(ValueError, match=r"\b5000 tokens: .*\b4096\b"):
        inspect_attention(small_model(position=Position.rotary), torch.zeros(1, 5000, dtype=torch.int64))
