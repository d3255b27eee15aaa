"""Learning rate schedules, and parameter groups with and without weight decay."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from torch import nn

from reformer_dist.config import AttentionKind, ModelConfig, OptimConfig, Position, Schedule
from reformer_dist.engine.optim import build_optimizer, learning_rate, parameter_groups
from reformer_dist.models import ReformerLM

WARMUP, LAST = 10, 110


def rates(schedule: Schedule, **changed: float) -> list[float]:
    config = OptimConfig(lr=2.0, schedule=schedule, warmup_steps=WARMUP, min_lr_ratio=0.1)
    for name, value in changed.items():
        setattr(config, name, value)
    return [learning_rate(config, step, LAST) for step in range(LAST + 20)]


@pytest.mark.parametrize("schedule", list(Schedule))
def test_warm_up_is_linear_and_never_0(schedule: Schedule) -> None:
    assert rates(schedule)[:WARMUP] == pytest.approx([0.2 * (step + 1) for step in range(WARMUP)])
    assert max(rates(schedule)) == pytest.approx(2.0)
    assert rates(schedule, warmup_steps=0)[0] == pytest.approx(2.0)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_no_rate_rises_after_the_warm_up(schedule: Schedule) -> None:
    after = rates(schedule)[WARMUP - 1 :]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(after))


def test_courses() -> None:
    middle = (WARMUP + LAST) // 2
    for schedule in (Schedule.cosine, Schedule.linear):
        found = rates(schedule)
        assert found[WARMUP] == pytest.approx(2.0)
        assert found[middle] == pytest.approx(1.1)  # halfway between 2 and 0.2
        assert found[LAST:] == pytest.approx([0.2] * 20)
    quarter = WARMUP + (LAST - WARMUP) // 4
    assert rates(Schedule.linear)[quarter] == pytest.approx(0.2 + 1.8 * 0.75)
    assert rates(Schedule.cosine)[quarter] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates(Schedule.constant)[WARMUP:] == [2.0] * (LAST + 20 - WARMUP)
    assert rates(Schedule.inverse_sqrt)[4 * WARMUP - 1] == pytest.approx(1.0)
    assert rates(Schedule.cosine, min_lr_ratio=0.0)[LAST] == 0.0


@pytest.mark.parametrize("schedule", list(Schedule))
def test_a_run_shorter_than_its_warm_up(schedule: Schedule) -> None:
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=10)
    assert [learning_rate(config, step, 5) for step in (0, 4)] == [0.1, 0.5]
    assert 0 < learning_rate(config, 10, 10) <= 1.0


def model(**changed: object) -> ReformerLM:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "axial_shape": [8, 8]}
    return ReformerLM(ModelConfig(**(sizes | changed)), 50)  # type: ignore[arg-type]


@pytest.mark.parametrize("position", list(Position))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_matrices_of_linear_layers_decay_and_nothing_else(position: Position, tied: bool, shared: bool) -> None:
    layers = [AttentionKind.lsh, AttentionKind.local]
    whole = model(position=position, tie_embeddings=tied, share_layers=shared, layers=layers, n_layers=4)
    linear = {id(module.weight) for module in whole.modules() if isinstance(module, nn.Linear)}
    if not tied:
        linear.add(id(whole.head.weight))
    decay = {id(p): group["weight_decay"] for group in parameter_groups(whole, 0.3) for p in group["params"]}
    assert decay == {id(p): 0.3 if id(p) in linear else 0.0 for p in whole.parameters()}
    assert len(linear) > 4
    listed = [p for group in parameter_groups(whole, 0.3) for p in group["params"]]
    assert len(listed) == len(decay)
    optimizer = build_optimizer(whole, OptimConfig(betas=[0.8, 0.9], eps=1e-6))
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_frozen_parameters_are_left_out() -> None:
    whole = model(tie_embeddings=True)
    whole.embedding.requires_grad_(False)
    listed = {id(p) for group in parameter_groups(whole, 0.3) for p in group["params"]}
    assert listed == {id(p) for p in whole.parameters() if p.requires_grad}


def test_no_empty_group() -> None:
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1
