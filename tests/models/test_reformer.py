"""Language model: randomness, dtypes, lengths and positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from model_helpers import EXACT, LOCAL, LSH, random_tokens, shifted, small_config, small_model, train
from torch import Tensor

from reformer_dist.config import AttentionKind, Position, Recompute
from reformer_dist.models import ReformerLM
from reformer_dist.models.attention import build_attention
from reformer_dist.models.context import build_context
from reformer_dist.models.embedding import AxialPositions, SinusoidalPositions
from reformer_dist.ops.rotary import rotary_tables

DROPOUTS = {"dropout": 0.1, "attention_dropout": 0.1, "ff_dropout": 0.1}


def loss_of(model: ReformerLM, **options: Any) -> Tensor:
    return model(random_tokens(), shifted(random_tokens()), **options).detach()


@torch.no_grad()
def test_loss_is_that_of_the_logits() -> None:
    for tie in (False, True):
        model = small_model(tie_embeddings=tie).eval()
        logits, labels = model(random_tokens()), shifted(random_tokens())
        assert logits.shape == (2, 37, 50) and logits.dtype == torch.float32
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
        torch.testing.assert_close(model(random_tokens(), labels), expected)


def test_evaluation_is_deterministic() -> None:
    model = small_model(**DROPOUTS).eval()
    assert torch.equal(model(random_tokens()), model(random_tokens()))
    again = small_model(**DROPOUTS).eval()
    assert torch.equal(model(random_tokens()), again(random_tokens()))
    assert not torch.equal(model(random_tokens()), small_model(seed=1).eval()(random_tokens()))


def test_a_step_draws_its_rotations() -> None:
    model = small_model(layers=[LSH])
    losses = [loss_of(model, step=step).item() for step in (0, 1, 2)]
    assert len({*losses, loss_of(model.eval(), step=None).item()}) == 4  # and evaluation has its own
    model.train()
    assert loss_of(model, step=1).item() == losses[1]


def test_layers_draw_their_own_rotations() -> None:
    model = small_model(layers=[LSH], share_layers=True, n_layers=2).eval()
    alone, other = (model.stack.blocks[0].attention for _ in range(2))
    x = torch.randn(2, 37, 24)
    context = model._build_context(random_tokens(), {"step": 0})
    assert not torch.equal(alone(x, context, 0, None), other(x, context, 1, None))


def test_dropout_is_a_function_of_its_seed() -> None:
    model = small_model(layers=[LSH, LOCAL, EXACT], **DROPOUTS)
    state = torch.random.get_rng_state()
    loss = loss_of(model, step=0, dropout_seed=1)
    assert torch.equal(loss, loss_of(model, step=0, dropout_seed=1))
    assert not torch.equal(loss, loss_of(model, step=0, dropout_seed=2))
    assert torch.equal(state, torch.random.get_rng_state())
    # evaluation has no dropout; training without a seed draws one
    assert torch.equal(loss_of(model.eval(), dropout_seed=1), loss_of(model.eval(), dropout_seed=2))
    torch.manual_seed(0)
    assert not torch.equal(loss_of(model.train(), step=0), loss_of(model, step=0))


@pytest.mark.parametrize("recompute", list(Recompute))
def test_backward_leaves_the_global_random_state(recompute: Recompute) -> None:
    model = small_model(layers=[LSH, LOCAL, EXACT], recompute=recompute, **DROPOUTS)
    state = torch.random.get_rng_state()
    model(random_tokens(), shifted(random_tokens()), step=0, dropout_seed=1).backward()
    assert torch.equal(state, torch.random.get_rng_state())


def test_streams_stay_float32_in_bf16() -> None:
    """Half-precision streams would lose small updates, and drift in reconstruction."""
    model = small_model(n_layers=6)
    expected = loss_of(model, step=0)
    drift = model.reversible_drift(random_tokens())
    assert drift.item() < 1e-5
    model.bfloat16()
    seen: list[Tensor] = []
    for block in model.stack.blocks:
        block.register_forward_hook(lambda _module, inputs, outputs: seen.extend([*inputs[0], *outputs]))
        block.attention.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].float()))
    loss = model(random_tokens(), shifted(random_tokens()), step=0)
    assert len(seen) == 6 * 5 and all(stream.dtype == torch.float32 for stream in seen)
    torch.testing.assert_close(loss, expected, rtol=0.01, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert model.reversible_drift(random_tokens()).item() < 0.02


def test_bf16_gradients_of_reversible_and_plain_agree() -> None:
    grads = []
    for recompute in (Recompute.none, Recompute.reversible):
        model = small_model(n_layers=6, recompute=recompute).bfloat16()
        model(random_tokens(), shifted(random_tokens()), step=0).backward()
        grads.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
    assert (grads[1] - grads[0]).norm() <= 0.02 * grads[0].norm()


@pytest.mark.parametrize("position", [Position.axial, Position.learned])
def test_too_long_inputs_are_refused(position: Position) -> None:
    model = small_model(position=position, axial_shape=[4, 10], max_seq_len=40)
    model(random_tokens(1, 40))
    with pytest.raises(ValueError, match=r"\b41 tokens.*\b40\b"):
        model(random_tokens(1, 41))


@pytest.mark.parametrize("position", [Position.rotary, Position.sinusoidal])
def test_other_positions_have_no_limit(position: Position) -> None:
    assert small_model(position=position)(random_tokens(1, 300)).shape == (1, 300, 50)


@pytest.mark.parametrize("kind", [LSH, LOCAL, EXACT])
def test_layers_without_rotary_positions_attend_by_content_alone(kind: AttentionKind) -> None:
    """Under other positions, with the same tokens in the same order, their output is the same."""
    x = torch.randn(1, 12, 24)

    def outputs(**changes: Any) -> tuple[Tensor, Tensor]:
        config = small_config(layers=[kind], position=Position.rotary, **changes)
        torch.manual_seed(0)
        layer = build_attention(config, kind).eval()
        context = build_context(config, 0, 12, x.device, {}, is_training=False)
        spread = replace(context, rotary=rotary_tables(3 * torch.arange(12), config.resolved_head_dim))
        return layer(x, context), layer(x, spread)

    without = outputs(rotary_layers=[other for other in AttentionKind if other is not kind])
    assert torch.equal(*without)
    assert not torch.allclose(*outputs(), atol=1e-4)


def test_positions_are_distinct() -> None:
    axial = AxialPositions([3, 4, 5], [2, 3, 4])
    for table in axial.tables:
        torch.nn.init.normal_(table)
    for vectors in (axial(torch.arange(60)), SinusoidalPositions(7)(torch.arange(60))):
        assert vectors.unique(dim=0).shape[0] == 60
    # the last side varies fastest, and the vectors of a side repeat
    assert axial(torch.arange(60)).shape == (60, 9)
    assert torch.equal(axial(torch.tensor([0, 20]))[0, 2:], axial(torch.tensor([0, 20]))[1, 2:])


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = small_model(tie_embeddings=True).state_dict()
    torch.manual_seed(2)
    second = small_model(tie_embeddings=True).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["head.weight"].data_ptr() == first["embedding.tokens.weight"].data_ptr()
    model = ReformerLM(small_config(dim=240), 2000)
    assert model.embedding.tokens.weight.std().item() == pytest.approx(1, abs=0.02)
    assert all(table.std().item() == pytest.approx(1, abs=0.1) for table in model.embedding.positions.tables)


def test_bucket_stats_of_lsh_layers_are_collected() -> None:
    bucket_stats: list[Any] = []
    model = small_model(layers=[LOCAL, LSH], n_layers=4)
    model(random_tokens(), shifted(random_tokens()), step=0, bucket_stats=bucket_stats).backward()
    assert len(bucket_stats) == 2 and all(
        h.largest_over_mean >= 1 and 0 <= h.full_windows <= 1 for h in bucket_stats
    )


def test_it_learns() -> None:
    losses = train(small_model(256, axial_shape=[16, 16]), steps=30, seq_len=250)
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5
