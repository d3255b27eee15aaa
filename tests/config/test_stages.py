"""The configuration in force at each step, a pure function of the configuration, and what a stage may not set."""

from __future__ import annotations

from typing import Any

import pytest

from reformer_dist.config import DataConfig, ModelConfig, Position, RunConfig, TaskConfig, TrainerConfig
from reformer_dist.config.stage_values import STAGED_KEYS, saved_in_force
from reformer_dist.config.stages import check_ranks, resolve_stages, stage_at
from reformer_dist.errors import ConfigError
from reformer_dist.run.compose import compose_run, run_config_from, to_dict

ROWS = DataConfig(seq_len=64, batch_size=4)
ROTARY = ModelConfig(position=Position.rotary)


def run(*stages: dict[str, Any], **changed: Any) -> RunConfig:
    return RunConfig(**{"model": ROTARY, "data": ROWS, **changed}, stages=list(stages))


def test_stages_by_steps_and_by_tokens() -> None:
    config = run(
        {"until": 10, "data.seq_len": 32},
        {"until_tokens": 10 * 128 + 1000, "data.batch_size": 6, "model.n_buckets": 2},  # of 384 tokens a step
        {"until": 20},
        {"data.seq_len": 128, "model.rotary_base": 1e5},
    )
    stages = resolve_stages(config)
    assert [(stage.first_step, stage.end_step) for stage in stages] == [(0, 10), (10, 13), (13, 20), (20, None)]
    assert [stage.config.data.seq_len for stage in stages] == [32, 64, 64, 128]
    assert [stage.config.data.batch_size for stage in stages] == [4, 6, 4, 4]
    assert [stage.config.model.n_buckets for stage in stages] == [64, 2, 64, 64]
    assert [stage.config.model.rotary_base for stage in stages] == [1e4, 1e4, 1e4, 1e5]
    assert all(stage.config.stages == [] for stage in stages)
    assert [stage_at(config, step).index for step in (0, 9, 10, 12, 13, 19, 20, 10**9)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_values_of_the_run_are_in_force_after_the_last_end() -> None:
    config = run({"until": 5, "model.n_hashes": 1})
    assert [stage.config.model.n_hashes for stage in resolve_stages(config)] == [1, config.model.n_hashes]
    assert [stage.config for stage in resolve_stages(run())] == [run()]


def test_a_saved_run_has_the_values_of_its_last_step() -> None:
    saved = to_dict(run({"until": 5, "data.seq_len": 32}, {"until_tokens": 5 * 128 + 256, "model.n_hashes": 1}))
    for step, seq_len, n_hashes in ((0, 32, 4), (5, 32, 4), (6, 64, 1), (7, 64, 4), (99, 64, 4)):
        found = saved_in_force(saved, step)
        assert (found["data"]["seq_len"], found["model"]["n_hashes"]) == (seq_len, n_hashes)
        assert found["stages"] == []
    assert saved == to_dict(run_config_from(saved, []))  # unchanged
    without = {key: value for key, value in saved.items() if key != "stages"}  # of an earlier version
    assert saved_in_force(without, 3) == without
    with pytest.raises(ConfigError, match=r"^stages=3: "):
        saved_in_force({**saved, "stages": 3}, 1)


def test_stages_on_the_command_line() -> None:
    words = "stages=[{until:1000,data.seq_len:512},{until_tokens:3000000,data.weights:null},{model.window:16}]"
    config = compose_run([words, "model.position=rotary"])
    assert config == run_config_from(to_dict(config), [])
    assert [stage.config.data.seq_len for stage in resolve_stages(config)] == [512, 2048, 2048]
    assert config.stages[2] == {"model.window": 16}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"until": 5, "optim.lr": 1e-3}], r"^stages\[0\]\.optim\.lr=0\.001: .*data\.seq_len.*model\.rotary_base"),
        ([{"until": 5, "model.n_bucket": 2}], r"^stages\[0\]\.model\.n_bucket=2: .*mean model\.n_buckets\?"),
        ([{"until": 5, "data": {"seq_len": 2}}], r"^stages\[0\]\.data="),
        ([{"until": 5}, {"until": 5}], r"^stages\[1\]\.until=5: .*above 5"),
        ([{"until": 0}], r"^stages\[0\]\.until=0: "),
        ([{"until": True}], r"^stages\[0\]\.until=True: "),
        ([{"until": 2.5}], r"^stages\[0\]\.until=2\.5: "),
        ([{"until": 5}, {"until_tokens": 1280}], r"^stages\[1\]\.until_tokens=1280: .*above 1280"),
        ([{"until": 5, "until_tokens": 5}], r"^stages\[0\]=.*either until .*until_tokens"),
        ([{"data.seq_len": 32}, {"until": 5}], r"^stages\[0\]=.*only the last"),
        ([{"until": 5, "data.seq_len": "x"}], r"^stages\[0\]\.data\.seq_len=x: "),
        ([{"until": 5, "data.seq_len": 1}], r"^stages\[0\]: data\.seq_len=1: .*at least 2"),
        ([{"until": 5, "model.n_buckets": 3}], r"^stages\[0\]: model\.n_buckets=3: "),
        ([{"until": 5}, {"model.window": "x"}], r"^stages\[1\]: model\.window='x': "),
        ([{"until": 5, "data.weights": [1.0]}], r"^stages\[0\]\.data\.weights=\[1\.0\]: .*all stages"),
        (["until"], r"^stages\[0\]=.*mapping"),
        ("until", r"^stages='until': .*list"),
    ],
)
def test_what_a_stage_can_not_be_is_refused(stages: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(model=ROTARY, data=ROWS, stages=stages)


def test_each_stage_must_fit_the_positions_the_task_and_the_ranks() -> None:
    with pytest.raises(ConfigError, match=r"^stages\[1\]: data\.seq_len=4096: .*2048.*axial"):
        run({"until": 5}, {"data.seq_len": 4096}, model=ModelConfig())
    masked = {"task": TaskConfig(kind="sequence_classification"), "model": ModelConfig(causal=False)}
    with pytest.raises(ConfigError, match=r"^stages\[0\]\.until_tokens=500: .*sequence_classification"):
        run({"until_tokens": 500}, **masked)
    staged = run({"until": 5, "data.batch_size": 6}, trainer=TrainerConfig(micro_batch_size=2))
    check_ranks(staged, 1)
    with pytest.raises(ConfigError, match=r"^stages\[0\]: trainer\.micro_batch_size=2: .*\b3 rows"):
        check_ranks(staged, 2)


def test_every_key_of_a_stage_exists() -> None:
    known = to_dict(RunConfig())
    assert all(key.split(".")[1] in known[key.split(".")[0]] for key in STAGED_KEYS)
