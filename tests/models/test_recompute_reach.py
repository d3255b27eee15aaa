"""Backward through recomputed layers reaches what forward read, wherever it comes from, or says why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_helpers import (
    EXACT,
    LOCAL,
    LSH,
    assert_grads_agree,
    grads_of,
    random_tokens,
    shifted,
    small_config,
    small_model,
    with_recompute,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

from reformer_dist.config import CrossAttentionKind, Recompute
from reformer_dist.models import ReformerEncoderDecoder, ReformerLM

RECOMPUTED = [Recompute.reversible, Recompute.checkpoint]
Backward = Callable[[ReformerLM], dict[str, Tensor]]


def loss_of(model: ReformerLM) -> Tensor:
    return model(random_tokens(), shifted(random_tokens()), step=3, dropout_seed=5)


def sublayers_of(model: ReformerLM) -> list[nn.Module]:
    return [layer for block in model.stack.blocks for layer in (block.attention, block.feed_forward)]


def gate_in_a_hook(model: ReformerLM) -> dict[str, Tensor]:
    gate = nn.Parameter(torch.tensor(0.7))
    for layer in sublayers_of(model):
        layer.register_forward_hook(lambda _module, _inputs, out: out * gate)
    loss_of(model).backward()
    return {**grads_of(model), "gate": gate.grad}


def gate_of_the_outer_graph(model: ReformerLM) -> dict[str, Tensor]:
    """Computed once from a parameter, and read by every layer."""
    source = nn.Parameter(torch.tensor([0.3]))
    gate = source.sigmoid() * 2
    for layer in sublayers_of(model):
        layer.register_forward_hook(lambda _module, _inputs, out: torch.stack([out, out * gate]).sum(dim=0))
    loss_of(model).backward()
    return {**grads_of(model), "gate": source.grad}


def gate_of_the_batch(model: ReformerLM) -> dict[str, Tensor]:
    """A function of the embedding's weight, which also has a gradient of its own."""
    gate = model.embedding.tokens.weight.mean(dim=1)[random_tokens()].unsqueeze(-1)
    for layer in sublayers_of(model)[::2]:
        layer.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * gate, *inputs[1:]))
    loss_of(model).backward()
    return grads_of(model)


def functional_call(model: ReformerLM) -> dict[str, Tensor]:
    """Other weights than the module's own; backward runs after the call."""
    weights = {name: (p.detach() * 1.1).requires_grad_() for name, p in model.named_parameters()}
    inputs = (random_tokens(), shifted(random_tokens()))
    torch.func.functional_call(model, weights, inputs, {"step": 3, "dropout_seed": 5}).backward()
    assert not grads_of(model)
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


def functional_call_of_computed_weights(model: ReformerLM) -> dict[str, Tensor]:
    scale = nn.Parameter(torch.tensor(0.9))
    weights = {name: p.detach() * scale for name, p in model.named_parameters()}
    inputs = (random_tokens(), shifted(random_tokens()))
    torch.func.functional_call(model, weights, inputs, {"step": 3, "dropout_seed": 5}).backward()
    return {"scale": scale.grad}


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def parametrized(model: ReformerLM, *, is_backward_inside: bool) -> dict[str, Tensor]:
    for layer in sublayers_of(model):
        parametrize.register_parametrization(layer.to_out, "weight", Scaled())
    with parametrize.cached():
        losses = [loss_of(model), loss_of(model)]
        if is_backward_inside:
            sum(losses).backward()
    if not is_backward_inside:
        sum(losses).backward()
    return grads_of(model)


def cached_parametrizations(model: ReformerLM) -> dict[str, Tensor]:
    return parametrized(model, is_backward_inside=False)


def cached_parametrizations_in_backward(model: ReformerLM) -> dict[str, Tensor]:
    return parametrized(model, is_backward_inside=True)


def random_hook(model: ReformerLM) -> dict[str, Tensor]:
    for layer in sublayers_of(model):
        layer.register_forward_hook(lambda _module, _inputs, out: nn.functional.dropout(out, 0.3))
    torch.manual_seed(0)
    loss_of(model).backward()
    return grads_of(model)


REACHED: list[Backward] = [
    gate_in_a_hook,
    gate_of_the_outer_graph,
    gate_of_the_batch,
    functional_call,
    functional_call_of_computed_weights,
    cached_parametrizations,
    cached_parametrizations_in_backward,
]


def assert_equal_to_plain(backward: Backward, recompute: Recompute, **changed: Any) -> None:
    plain = small_model(recompute=Recompute.none, layers=[LSH, LOCAL, EXACT], n_layers=3, **changed)
    model = with_recompute(plain, recompute)
    expected, found = backward(plain), backward(model)
    assert found.keys() == expected.keys() and found
    largest = max(grad.norm().item() for grad in expected.values())
    for name in expected:
        error = (found[name] - expected[name]).norm().item()
        assert error <= 1e-5 * (expected[name].norm().item() + 0.01 * largest), f"{name} is off by {error}"


@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize("backward", REACHED)
def test_gradients_equal_those_of_plain_autograd(backward: Backward, recompute: Recompute) -> None:
    assert_equal_to_plain(backward, recompute, dropout=0.1)


@pytest.mark.parametrize("backward", [gate_in_a_hook, functional_call])
def test_chunks_of_the_feed_forward_and_shared_layers(backward: Backward) -> None:
    assert_equal_to_plain(backward, Recompute.reversible, ff_chunk=10)
    assert_equal_to_plain(backward, Recompute.reversible, share_layers=True)


def test_checkpoints_repeat_a_hook_s_random_draw() -> None:
    assert_equal_to_plain(random_hook, Recompute.checkpoint)


@pytest.mark.parametrize("kind", list(CrossAttentionKind))
def test_an_encoder_decoder_under_functional_call(kind: CrossAttentionKind) -> None:
    grads = []
    for recompute in Recompute:
        model = ReformerEncoderDecoder(small_config(cross_attention=kind, recompute=recompute, n_layers=2), 50)
        weights = {name: (p.detach() * 1.1).requires_grad_() for name, p in model.named_parameters()}
        inputs = (random_tokens(seed=1), random_tokens(), shifted(random_tokens()))
        torch.func.functional_call(model, weights, inputs, {"step": 0}).backward()
        grads.append(torch.cat([weight.grad.flatten() for weight in weights.values()]))
    for found in grads[:2]:
        assert (found - grads[2]).norm() <= 1e-5 * grads[2].norm()


def dropout_in_a_hook(model: ReformerLM) -> None:
    random_hook(model)


def changed_streams(model: ReformerLM) -> None:
    model.stack.blocks[1].register_forward_hook(lambda _module, _inputs, out: (out[0] * 1.01, out[1]))
    loss_of(model).backward()


def streams_changed_in_place(model: ReformerLM) -> None:
    def scale(_module: nn.Module, _inputs: Any, out: tuple[Tensor, Tensor]) -> None:
        with torch.no_grad():
            out[1].mul_(1.01)

    model.stack.blocks[0].register_forward_hook(scale)
    loss_of(model).backward()


def cast_streams(model: ReformerLM) -> None:
    model.stack.blocks[1].register_forward_pre_hook(lambda _module, x: (x[0].bfloat16(), x[1].bfloat16(), *x[2:]))
    loss_of(model).backward()


def step_before_backward(model: ReformerLM) -> None:
    loss = loss_of(model)
    with torch.no_grad():
        model.stack.blocks[0].attention.to_v.weight.mul_(1.1)
    loss.backward()


def other_tensors_in_backward(model: ReformerLM) -> None:
    gates = [nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.6))]
    sublayers_of(model)[0].register_forward_hook(lambda _module, _inputs, out: out * gates[0])
    loss = loss_of(model)
    gates.reverse()
    loss.backward()


def second_backward(model: ReformerLM) -> None:
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()


def double_backward(model: ReformerLM) -> None:
    model.head.weight.requires_grad_(False)
    logits = model(random_tokens(), step=0)
    torch.autograd.grad(logits.sum(), list(model.stack.parameters()), create_graph=True)


def functional_gradient(model: ReformerLM) -> None:
    weights = dict(model.named_parameters())
    torch.func.grad(lambda w: torch.func.functional_call(model, w, (random_tokens(),)).sum())(weights)


REFUSED = {
    dropout_in_a_hook: "global generator",
    changed_streams: "stream",
    streams_changed_in_place: "stream",
    cast_streams: "cast_forward_inputs",
    step_before_backward: "modified",
    other_tensors_in_backward: "gradients would be lost",
    second_backward: "backward once",
    double_backward: "create_graph=True",
    functional_gradient: "torch.func",
}


@pytest.mark.parametrize("misuse", list(REFUSED), ids=lambda misuse: misuse.__name__)
def test_what_has_no_right_gradient_is_refused(misuse: Callable[[ReformerLM], None]) -> None:
    with pytest.raises(RuntimeError, match=rf"(?s){REFUSED[misuse]}.*model\.recompute=none"):
        misuse(small_model())


def test_the_way_out_of_second_order_works() -> None:
    """Plain autograd with the reference backend: a gradient of a gradient, and a transform."""
    config = {"recompute": Recompute.none, "attention_backend": "reference", "layers": [LSH, LOCAL]}
    model = small_model(**config)
    logits = model(random_tokens(), step=0)
    (grad,) = torch.autograd.grad(logits.sum(), [model.stack.norm.weight], create_graph=True)
    grad.square().sum().backward()
    assert grads_of(model)


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.checkpoint])
def test_a_second_backward_elsewhere(recompute: Recompute) -> None:
    model = small_model(recompute=recompute)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    once = {name: grad.clone() for name, grad in grads_of(model).items()}
    loss.backward()
    assert all(torch.allclose(grads_of(model)[name], 2 * once[name]) for name in once)


def test_frozen_weights_and_unread_ones_stay_without_gradient() -> None:
    plain = small_model(recompute=Recompute.none)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("attention" in name)
    model = with_recompute(plain, Recompute.reversible)
    for each in (plain, model):
        loss_of(each).backward()
    assert_grads_agree(model, plain, 1e-5)
