"""Learning rate schedules, and parameter groups with and without weight decay."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from torch import nn

from reformer_dist.config import (
    AttentionKind,
    DecayShape,
    ModelConfig,
    OptimConfig,
    OptimizerKind,
    ParameterGroup,
    Position,
    Schedule,
)
from reformer_dist.engine.groups import Group, Update, freeze, parameter_groups
from reformer_dist.engine.optim import build_optimizer, set_learning_rate
from reformer_dist.engine.schedule import learning_rate
from reformer_dist.errors import ConfigError
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


@pytest.mark.parametrize("shape", list(DecayShape))
def test_the_stable_phase_does_not_depend_on_the_end_of_the_run(shape: DecayShape) -> None:
    stable = OptimConfig(lr=2.0, schedule=Schedule.wsd, warmup_steps=WARMUP)
    decaying = replace(stable, decay_from=60, decay=shape)
    before = [learning_rate(stable, step, 10**6) for step in range(60)]
    assert before == [learning_rate(decaying, step, LAST) for step in range(60)]
    assert before[WARMUP:] == [2.0] * (60 - WARMUP)
    assert [learning_rate(stable, step, 100) for step in (99, 100, 10**7)] == [2.0] * 3
    middle = {DecayShape.linear: 0.5, DecayShape.cosine: 0.5, DecayShape.one_minus_sqrt: 1 - math.sqrt(0.5)}
    assert learning_rate(decaying, 60, LAST) == 2.0
    assert learning_rate(decaying, 85, LAST) == pytest.approx(0.2 + 1.8 * middle[shape])
    assert [learning_rate(decaying, step, LAST) for step in (LAST, LAST + 9)] == pytest.approx([0.2] * 2)


def test_a_decay_begins_at_the_rate_of_the_schedule() -> None:
    config = OptimConfig(lr=1.0, schedule=Schedule.inverse_sqrt, warmup_steps=4, decay_from=64)
    assert learning_rate(config, 64, 100) == learning_rate(config, 63, 100) == 0.25
    assert learning_rate(config, 100, 100) == pytest.approx(0.1)
    low = replace(config, min_lr_ratio=0.5)
    assert learning_rate(low, 99, 100) == 0.25  # no decay ends above where it began


@pytest.mark.parametrize("schedule", [Schedule.cosine, Schedule.linear])
def test_a_restart_is_continuous_and_keeps_what_was_before(schedule: Schedule) -> None:
    once = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=5)
    again = replace(once, restarts=[50, 100])
    course = [learning_rate(again, step, 150) for step in range(150)]
    assert course[:50] == [learning_rate(once, step, 50) for step in range(50)]
    for restart in (50, 100):
        assert course[restart : restart + 5] == pytest.approx([0.28, 0.46, 0.64, 0.82, 1.0])
        assert course[restart + 5 :][:45] == pytest.approx(course[5:50])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"decay_from": 50}, r"^optim\.decay_from=50: .*cosine"),
        ({"schedule": "wsd", "decay_from": 5}, r"^optim\.decay_from=5: .*warmup_steps=10"),
        ({"schedule": "wsd", "restarts": [5]}, r"^optim\.restarts=\[5\]: .*wsd"),
        ({"restarts": [9, 9]}, r"^optim\.restarts=\[9, 9\]: .*ascending"),
        ({"restarts": [0]}, r"^optim\.restarts=\[0\]: .*above 0"),
        ({"decay": "1-sqrt"}, r"^optim\.decay=1-sqrt: .*one_minus_sqrt"),
    ],
)
def test_keys_of_another_schedule_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimConfig(warmup_steps=WARMUP, **changed)


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
    whole = model(
        position=position, tie_embeddings=tied, share_layers=shared, layers=layers, n_layers=4, qk_conv=3
    )
    linear = {id(module.weight) for module in whole.modules() if isinstance(module, nn.Linear)}
    if not tied:
        linear.add(id(whole.head.weight))
    groups = parameter_groups(whole, OptimConfig(weight_decay=0.3, betas=[0.8, 0.9], eps=1e-6))
    listed = [p for group in groups for p in group.parameters.values()]
    decay = {id(p): group.weight_decay for group in groups for p in group.parameters.values()}
    assert decay == {id(p): 0.3 if id(p) in linear else 0.0 for p in whole.parameters()}
    assert len(linear) > 4
    assert len(listed) == len(decay)
    optimizer = build_optimizer(groups, OptimConfig(betas=[0.8, 0.9], eps=1e-6))
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_frozen_parameters_are_left_out() -> None:
    whole = model(tie_embeddings=True)
    whole.embedding.requires_grad_(False)
    listed = {id(p) for group in parameter_groups(whole, OptimConfig()) for p in group.parameters.values()}
    assert listed == {id(p) for p in whole.parameters() if p.requires_grad}


def test_no_empty_group() -> None:
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), OptimConfig())) == 1


def groups_of(*groups: ParameterGroup, **optim: Any) -> dict[str, Group]:
    """The group of each parameter that is trained."""
    config = OptimConfig(groups=list(groups), **optim)
    whole = model(qk_conv=3)
    freeze(whole, config)
    return {name: group for group in parameter_groups(whole, config) for name in group.parameters}


def test_the_first_group_that_matches_applies() -> None:
    found = groups_of(
        ParameterGroup(match="embedding.*", lr=0.05, weight_decay=0.3),
        ParameterGroup(match="stack.blocks.0.*", frozen=True),
        ParameterGroup(match="*.attention.*", weight_decay=0.0),
        ParameterGroup(match="*", lr=0.2),
        lr=0.1,
        weight_decay=0.5,
    )
    assert (found["embedding.tokens.weight"].lr_scale, found["embedding.tokens.weight"].weight_decay) == (0.5, 0.3)
    assert not any(name.startswith("stack.blocks.0.") for name in found)
    assert found["stack.blocks.1.attention.to_v.weight"].weight_decay == 0.0
    assert found["stack.blocks.1.attention.to_v.weight"].lr_scale == 1.0
    assert [found[f"head.{name}"].weight_decay for name in ("weight", "bias")] == [0.5, 0.0]
    assert found["head.bias"].lr_scale == 2.0


def test_learning_rates_of_groups_follow_the_schedule() -> None:
    config = OptimConfig(lr=0.1, groups=[ParameterGroup(match="head.*", lr=0.05)])
    whole = model()
    optimizer = build_optimizer(parameter_groups(whole, config), config)
    set_learning_rate(optimizer, 0.02)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(whole.head.weight)] == pytest.approx(0.01)
    assert rates[id(whole.embedding.tokens.weight)] == 0.02


def test_muon_updates_the_matrices_of_layers_alone() -> None:
    found = groups_of(kind=OptimizerKind.muon)
    muon = {name for name, group in found.items() if group.update is Update.muon}
    assert muon == {
        name for name in found if name.startswith("stack.blocks.") and ".to_" in name and "bias" not in name
    }
    assert {found[name].update for name in found.keys() - muon} == {Update.adamw}
    factored = {
        name for name, group in groups_of(kind=OptimizerKind.adafactor).items() if not group.update.moments
    }
    assert factored == {name for name, p in model(qk_conv=3).named_parameters() if p.dim() == 2}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"match": "embeding.*", "lr": 0.1}], r"optim\.groups\[0\]\.match=embeding\.\*: .*embedding\.\*"),
        (
            [{"match": "*", "lr": 0.1}, {"match": "head.*", "lr": 0.1}],
            r"optim\.groups\[1\]\.match=head.*before it",
        ),
        ([{"match": "*", "frozen": True}], r"optim\.groups: .*every parameter"),
        ([{"match": "head.*"}], r"match=head\.\*: sets nothing"),
        ([{"match": "head.*", "frozen": True, "lr": 0.1}], r"match=head\.\*: frozen=true excludes lr"),
        ([{"lr": 0.1}], r"match='': "),
        ([{"match": "head.*", "rate": 0.1}], "rate"),
        ([{"match": "head.*", "lr": -1.0}], r"lr=-1"),
        ([3], r"optim\.groups\[0\]=3: must be a ParameterGroup"),
    ],
)
def test_groups_that_are_refused(groups: list[Any], message: str) -> None:
    with pytest.raises((ConfigError, TypeError), match=message):
        parameter_groups(model(), OptimConfig(groups=groups))


def test_rates_of_groups_need_one_to_be_relative_to() -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr=0.*optim\.groups"):
        OptimConfig(lr=0.0, groups=[ParameterGroup(match="*", lr=0.1)])
