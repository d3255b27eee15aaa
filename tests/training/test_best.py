"""The best checkpoint by a metric is kept, and a run without a better one ends; both exactly over resumes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from run_helpers import checkpoint, interrupted, losses, train
from support.tiny import tiny_config
from support.weights import assert_same

from reformer_dist.checkpoint import CheckpointReader, resolve_checkpoint
from reformer_dist.checkpoint.files import step_folders, step_of
from reformer_dist.config import TrainerConfig
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import CheckpointError, ConfigError
from reformer_dist.training.best import BestTracker
from reformer_dist.training.checkpoint_manager import TrainState
from reformer_dist.training.validator import Validator

SCRIPT = {1: 5.0, 2: 3.0, 3: 4.0, 4: math.nan, 5: 3.0, 6: 2.0}
"""Held-out loss by step."""
BEST = ("trainer.keep_best=eval/loss", "trainer.eval_every=1", "trainer.keep_checkpoints=1", "data.eval_rows=1")


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Validator.evaluate

    def follow(self: Validator, step: int, seconds: float) -> dict[str, float]:
        return {**evaluate(self, step, seconds), "eval/loss": SCRIPT[step]}

    monkeypatch.setattr(Validator, "evaluate", follow)


def kept(run: Path) -> list[int]:
    return [step_of(folder) for folder in step_folders(run / "checkpoints")]


def test_the_best_is_saved_off_schedule_and_kept(tiny_data: Path, tmp_path: Path, job: Runtime) -> None:
    run = train(job, tiny_data, tmp_path / "run", *BEST, "trainer.save_every=3", "trainer.max_steps=5")
    assert kept(run) == [2, 5]
    assert resolve_checkpoint(run, best=True) == checkpoint(run, 2)
    progress = CheckpointReader(checkpoint(run, 5)).record.progress or {}
    assert progress["best"] == {"metric": "eval/loss", "value": 3.0, "step": 2}
    train(job, tiny_data, run, *BEST, "trainer.save_every=3", "optim.accept_jump=true")
    assert kept(run) == [6]
    assert resolve_checkpoint(run, best=True) == checkpoint(run, 6)


def test_a_run_without_a_better_evaluation_ends(
    tiny_data: Path, tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture
) -> None:
    words = (*BEST, "trainer.save_every=1", "trainer.keep_checkpoints=0", "trainer.patience=2")
    SCRIPT[4], before = 3.5, SCRIPT[4]
    try:
        run = train(job, tiny_data, tmp_path / "run", *words)
        assert kept(run) == [1, 2, 3, 4]
        assert "step 4 is the last: trainer.patience=2: 2 evaluations" in said.text
        said.clear()
        train(job, tiny_data, run, *words)
        assert kept(run) == [1, 2, 3, 4]
        assert "nothing to train: trainer.patience=2" in said.text
        resumed = train(job, tiny_data, interrupted(run, tmp_path / "resumed", 3), *words)
        assert kept(resumed) == [3, 4]
        assert_same(checkpoint(resumed, 4), checkpoint(run, 4))
        assert losses(resumed) == {step: row for step, row in losses(run).items() if step > 3}
        train(job, tiny_data, resumed, *words[:-1], "trainer.patience=3")
        assert kept(resumed) == [3, 4, 5]
    finally:
        SCRIPT[4] = before


def tracker(mode: str = "auto", **config: Any) -> tuple[BestTracker, TrainState]:
    state = TrainState()
    values: Mapping[str, Any] = {"keep_best": "eval/loss", "eval_every": 1, "best_mode": mode, **config}
    return BestTracker(TrainerConfig(**values), state, ["eval/loss", "eval/accuracy"]), state


def steps_of(mode: str, metric: str) -> list[int]:
    """Steps that are the best so far."""
    best, state = tracker(mode, keep_best=metric)
    found = []
    for state.step, value in enumerate((2.0, math.nan, 1.0, 3.0, 3.0, 0.5)):
        if best.end_evaluation({metric: value}):
            found.append(state.step)
    return found


def test_directions() -> None:
    assert steps_of("auto", "eval/loss") == steps_of("min", "eval/accuracy") == [0, 2, 5]
    assert steps_of("auto", "eval/accuracy") == steps_of("max", "eval/loss") == [0, 3]


def test_a_repeated_evaluation_counts_once() -> None:
    best, state = tracker(patience=2)
    for state.step in (1, 2, 2, 2):
        best.end_evaluation({"eval/loss": 1.0})
    assert state.evaluations_since_best == 1
    assert not best.should_stop


def test_the_best_weights_whose_save_failed_are_not_the_best() -> None:
    best, state = tracker()
    for state.step, value, has_failed in ((1, 3.0, False), (2, 2.0, True), (3, 2.5, False)):
        assert best.end_evaluation({"eval/loss": value})
        best.end_save(has_failed=False)  # of an earlier step
        best.begin_save()
        best.end_save(has_failed=has_failed)
        assert state.best is not None
        assert state.best["step"] == (1 if has_failed else state.step)


def test_refusals(tiny_data: Path, tmp_path: Path, job: Runtime) -> None:
    for word, message in (
        ("trainer.keep_best=loss", r"trainer\.keep_best=loss: .*eval/loss"),
        ("trainer.patience=3", r"trainer\.patience=3: .*trainer\.keep_best"),
        ("trainer.keep_best=eval/loss", r"trainer\.keep_best=eval/loss: .*trainer\.eval_every"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny_config(tiny_data, tmp_path, word)
    words = ("trainer.keep_best=eval_average/loss", "trainer.eval_every=1")
    with pytest.raises(ConfigError, match=r"trainer\.keep_best=eval_average/loss: .*optim\.average"):
        tiny_config(tiny_data, tmp_path, *words)
    with pytest.raises(ConfigError, match=r"trainer\.keep_best=eval/accuracy: .*measures eval/bits_per_byte"):
        train(job, tiny_data, tmp_path / "run", "trainer.keep_best=eval/accuracy", "trainer.eval_every=1")
    run = train(job, tiny_data, tmp_path / "plain", "trainer.max_steps=1")
    with pytest.raises(CheckpointError, match=r"--best: .*trainer\.keep_best"):
        resolve_checkpoint(run, best=True)
