"""Spikes are counted and written down, and skipped if asked for, exactly; steps whose rows are left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import LOSS, checkpoint, interrupted, losses, train
from support.events import scalars
from support.tiny import tiny_config
from support.weights import assert_same

from reformer_dist.checkpoint import CheckpointReader
from reformer_dist.config import DataConfig, TrainerConfig
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.engine import StepResult, TrainEngine
from reformer_dist.engine.rejection import asked_before_update
from reformer_dist.errors import ConfigError, TrainingError
from reformer_dist.training.spikes import SPIKES_FILE, RunningMean

JUDGED = ("trainer.spike_window=2", "trainer.spike_sigma=20")
SKIPPED = (*JUDGED, "trainer.skip_spikes=true")


def spikes(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / SPIKES_FILE).read_text().splitlines()]


@pytest.fixture
def spike_at_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of step 4, of 4 micro-batches each, is a thousand times as large."""
    backward = TrainEngine.backward
    count = [0]

    def scaled(self: TrainEngine, loss: Any, n_labels: float) -> None:
        backward(self, loss * 1000.0 if count[0] // self.n_micro + 1 == 4 else loss, n_labels)
        count[0] += 1

    monkeypatch.setattr(TrainEngine, "backward", scaled)


@pytest.mark.parametrize(
    "zero",
    [
        ("deepspeed.stage=0",),
        ("deepspeed.stage=1",),
        ("deepspeed.stage=2", "trainer.precision=bf16"),
        ("deepspeed.stage=2", "deepspeed.offload_optimizer=true"),
    ],
    ids=" ".join,
)
def test_a_skipped_spike_leaves_no_trace(
    zero: tuple[str, ...], tiny_data: Path, tmp_path: Path, job: Runtime, spike_at_4: None
) -> None:
    """The weights and moments are those of a run that does not train on the rows of step 4."""
    run = train(job, tiny_data, tmp_path / "run", *SKIPPED, *zero)
    [spike] = spikes(run)
    assert (spike["step"], spike["was_skipped"], list(spike["limits"])) == (4, True, ["grad_norm"])
    assert spike["grad_norm"] > 100 * spike["limits"]["grad_norm"]
    spared = train(job, tiny_data, tmp_path / "spared", *JUDGED, *zero, "data.skip_steps=[4,4]")
    assert not (spared / SPIKES_FILE).exists()
    for step in (3, 6):
        assert_same(checkpoint(run, step), checkpoint(spared, step))
    assert scalars(run, "train/spikes") == {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1}
    assert scalars(run, "train/skipped_steps")[6] == 1
    assert losses(run)[4][LOSS] is None and losses(spared)[4][LOSS] is None


def test_a_spike_is_trained_on_unless_it_shall_be_skipped(
    tiny_data: Path, tmp_path: Path, job: Runtime, spike_at_4: None, said: pytest.LogCaptureFixture
) -> None:
    run = train(job, tiny_data, tmp_path / "run", *JUDGED)
    [spike] = spikes(run)
    assert (spike["step"], spike["was_skipped"]) == (4, False)
    assert any(message.startswith("step 4 is a spike: grad norm ") for message in said.messages)
    assert any(" | spikes 1 | " in message for message in said.messages)


def test_the_rows_of_a_spike_are_named(tiny_data: Path, tmp_path: Path, job: Runtime, spike_at_4: None) -> None:
    [spike] = spikes(train(job, tiny_data, tmp_path / "run", *JUDGED))
    assert sorted(spike["rows"]) == ["0", "1", "2", "3"]
    for ids in spike["rows"].values():
        spans = [re.fullmatch(r"0/train-[^/]+\.tar/[^/:]+:(\d+)-(\d+)", each) for each in ids]
        assert sum(int(span[2]) - int(span[1]) for span in spans if span) == 64


def test_a_resumed_run_judges_like_an_uninterrupted_one(
    tiny_data: Path, tmp_path: Path, job: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Low limits, which steps pass on their own."""
    low = ("trainer.spike_window=2", "trainer.spike_sigma=0.1", "trainer.skip_spikes=true", "trainer.max_steps=9")
    whole = train(job, tiny_data, tmp_path / "whole", *low)
    found = [spike["step"] for spike in spikes(whole)]
    assert any(step <= 6 for step in found) and any(step > 6 for step in found)
    run = interrupted(whole, tmp_path / "run", 6)
    (run / SPIKES_FILE).write_text((whole / SPIKES_FILE).read_text())  # written until the kill
    train(job, tiny_data, run, *low)
    assert spikes(run) == spikes(whole)
    assert_same(checkpoint(run, 9), checkpoint(whole, 9))
    progress = [CheckpointReader(checkpoint(each, 9)).record.progress or {} for each in (run, whole)]
    assert progress[0]["running"] == progress[1]["running"]
    assert progress[0]["spikes"] == progress[1]["spikes"] == len(found)


def test_too_many_spikes_in_a_row_stop_the_run(
    tiny_data: Path, tmp_path: Path, job: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TrainEngine.step

    def rejecting(self: TrainEngine, lr: float, accepts: Any = None) -> StepResult:
        return step(self, lr, lambda norm: False)

    monkeypatch.setattr(TrainEngine, "step", rejecting)
    with pytest.raises(TrainingError, match=r"^trainer\.max_skipped_steps=2: .*spikes"):
        train(job, tiny_data, tmp_path / "run", "trainer.max_skipped_steps=2")


def test_a_rejected_step_keeps_the_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer of ZeRO is asked once, at the norm without the scale, and sees an infinite one if rejected."""

    class Optimizer:
        loss_scale = 8.0

        def scaled_global_norm(self) -> torch.Tensor:
            return torch.tensor(24.0)

        def _get_norm_groups(self) -> list[torch.Tensor]:
            return [torch.tensor(24.0), torch.tensor(32.0)]

    asked: list[float] = []
    optimizer = Optimizer()
    with asked_before_update(optimizer, 2, lambda norm: bool(asked.append(norm))) as rejected:
        assert float(optimizer.scaled_global_norm()) == float("inf")
    with asked_before_update(optimizer, 3, lambda norm: not asked.append(norm)) as accepted:  # type: ignore[func-returns-value]
        assert [float(norm) for norm in optimizer._get_norm_groups()] == [24.0, 32.0]
    assert (asked, rejected, accepted) == ([3.0, 5.0], [3.0], [])
    assert float(optimizer.scaled_global_norm()) == 24.0


def test_running_mean() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    running = RunningMean()
    for value in values:
        running = running.with_value(value, window=100)
    assert running.mean == pytest.approx(np.mean(values))
    assert running.limit(2.0) == pytest.approx(np.mean(values) + 2 * np.std(values))
    assert RunningMean(mean=2.0).limit(6.0) == pytest.approx(2.12)  # equal values have a spread of their own
    late = RunningMean(0.0, 0.0, 4.0).with_value(8.0, window=4)
    assert (late.mean, late.n_values) == (2.0, 4.0)


def test_rows_of_several_ranges_are_left_out(
    tiny_data: Path, tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture
) -> None:
    run = train(job, tiny_data, tmp_path / "run", "data.skip_steps=[[2,3],[5,5]]")
    assert [step for step, row in losses(run).items() if row[LOSS] is None] == [2, 3, 5]
    assert sum("data.skip_steps" in message for message in said.messages) == 3
    resumed = train(job, tiny_data, interrupted(run, tmp_path / "resumed", 3), "data.skip_steps=[[2,3],[5,5]]")
    assert_same(checkpoint(resumed, 6), checkpoint(run, 6))


@pytest.mark.parametrize("steps", [[0, 2], [3, 2], [1], 7, [[1, 2], 3], ["a", "b"], [1.0, 2.0]])
def test_ranges_that_are_none_are_refused(steps: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.skip_steps={re.escape(str(steps))}: "):
        DataConfig(skip_steps=steps)


def test_skipping_needs_a_limit(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.skip_spikes=True: .*spike_sigma"):
        TrainerConfig(skip_spikes=True, spike_sigma=0.0)
    config = tiny_config(tiny_data, tmp_path, "data.skip_steps=[2,3]")
    assert config.data.skipped_ranges() == [range(2, 4)]
