"""Rows reach a tracker once, whatever interrupts the run; the trackers themselves are tried in tests/slow."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import train

from reformer_dist.config import TrackerConfig, TrackerKind
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import ConfigError
from reformer_dist.process.log import logger
from reformer_dist.training import metrics_log
from reformer_dist.training.metrics_log import MetricsLogger
from reformer_dist.training.tracker import RowTracker, RunDescription, SavedRun, TrackedStep, require_tracker
from reformer_dist.training.wandb_tracker import BLOCK, _records


class Store(RowTracker):
    """A tracker that keeps the steps after the last one that it has, as wandb does."""

    kind = TrackerKind.wandb

    def __init__(self, stored: list[TrackedStep]) -> None:
        super().__init__()
        self.stored = stored
        self.is_away = self.is_finished = False

    def _send(self, step: TrackedStep) -> None:
        if self.is_away:
            raise ConnectionError("no route to host")
        if step.step > max((each.step for each in self.stored), default=-1):
            self.stored.append(step)

    def _finish(self) -> None:
        if self.is_away:
            raise ConnectionError("no route to host")
        self.is_finished = True


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[TrackedStep]:
    """What the tracker of all runs of a test has."""
    steps: list[TrackedStep] = []
    monkeypatch.setattr(metrics_log, "_open_row_tracker", lambda tracker, run: Store(steps))
    return steps


def open_logger(folder: Path, resume_step: int) -> MetricsLogger:
    run = RunDescription(folder, "run", {})
    config = TrackerConfig(kind=TrackerKind.wandb)
    return MetricsLogger(folder, is_active=True, resume_step=resume_step, tracker=config, run=run)


def log(metrics: MetricsLogger, steps: range, value: float = 1.0) -> None:
    for step in steps:
        metrics.scalars({"train/loss": value + step}, step, float(step))
        metrics.scalars({"eval/loss": value - step}, step, float(step))
        metrics.end_step()


def test_replayed_steps_are_not_repeated(tmp_path: Path, stored: list[TrackedStep]) -> None:
    log(open_logger(tmp_path, 0), range(1, 6))  # killed
    resumed = open_logger(tmp_path, 3)
    log(resumed, range(4, 8))
    resumed.close()
    assert [each.step for each in stored] == [1, 2, 3, 4, 5, 6, 7]
    assert stored[3].scalars == {"time_s": 4.0, "train/loss": 5.0, "eval/loss": -3.0}


def test_steps_that_a_killed_run_has_not_stored_come_from_the_file(
    tmp_path: Path, stored: list[TrackedStep]
) -> None:
    log(open_logger(tmp_path, 0), range(1, 6))
    expected = [(each.step, each.scalars) for each in stored[:3]]
    del stored[1:]  # was still in the memory of the tracker's process
    resumed = open_logger(tmp_path, 3)
    log(resumed, range(4, 5))
    resumed.close()
    assert [each.step for each in stored] == [1, 2, 3, 4]
    assert [(each.step, each.scalars) for each in stored[:3]] == expected


def test_an_interrupted_evaluation_joins_its_step(tmp_path: Path, stored: list[TrackedStep]) -> None:
    first = open_logger(tmp_path, 0)
    first.scalars({"train/loss": 1.0}, 1, 1.0)
    first.flush()  # saved during the evaluation, and killed
    assert stored == []
    second = open_logger(tmp_path, 1)
    second.scalars({"eval/loss": 2.0}, 1, 1.0)
    second.end_step()
    second.scalars({"train/loss": 3.0}, 2, 2.0)
    second.close()  # stopped by a signal during the next evaluation
    assert [(each.step, each.scalars) for each in stored] == [
        (1, {"time_s": 1.0, "train/loss": 1.0, "eval/loss": 2.0})
    ]


def test_a_tracker_that_is_away_stops_nothing(
    tmp_path: Path, stored: list[TrackedStep], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    metrics = open_logger(tmp_path, 0)
    store: Any = metrics._tracker
    store.is_away = True
    log(metrics, range(1, 4))
    assert stored == []
    assert sum("no route to host" in message for message in caplog.messages) == 1
    store.is_away = False
    log(metrics, range(4, 5))
    assert [each.step for each in stored] == [1, 2, 3, 4]
    metrics.close()
    assert store.is_finished
    store.is_away = True
    store.close()
    assert "could not be ended" in caplog.messages[-1]


def test_what_is_no_number_is_not_sent(tmp_path: Path, stored: list[TrackedStep]) -> None:
    metrics = open_logger(tmp_path, 0)
    metrics.scalars({"train/loss": math.nan, "train/lr": 0.1}, 1, 1.0)
    metrics.end_step()
    assert stored[0].scalars == {"time_s": 1.0, "train/lr": 0.1}


def test_a_run_logs_texts_and_histograms_too(
    tiny_data: Path, tmp_path: Path, job: Runtime, stored: list[TrackedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reformer_dist.run.build.require_tracker", lambda config: None)
    observed = ("trainer.eval_every=3", "trainer.sample_every=6", "trainer.sample_tokens=5", "data.eval_rows=1")
    run = train(job, tiny_data, tmp_path / "run", "tracker.kind=wandb", *observed)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": each.step, **each.scalars} for each in stored] == rows
    assert not (run / "tensorboard").exists()
    assert [each.step for each in stored if each.texts] == [6]
    [sizes] = stored[2].histograms.values()
    assert float(np.mean(sizes)) == pytest.approx(1.0)  # bucket sizes over their mean
    assert len(sizes) == 2 * 4 * 4  # heads, rounds, buckets


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reformer_dist.training.tracker.find_spec", lambda name: None)
    for kind in ("wandb", "mlflow"):
        with pytest.raises(ConfigError, match=rf"^tracker={kind}: .*pip install 'reformer_dist\[{kind}\]'"):
            require_tracker(TrackerConfig(kind=TrackerKind[kind]))
    require_tracker(TrackerConfig())


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"offline": True}, "tracker.offline=True"),
        ({"kind": TrackerKind.wandb, "uri": "http://host"}, "tracker.uri=http://host"),
        ({"kind": TrackerKind.mlflow, "uri": "http://host", "offline": True}, "tracker.uri=http://host"),
        ({"project": ""}, "tracker.project=''"),
    ],
)
def test_keys_that_would_have_no_effect_are_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: "):
        TrackerConfig(**values)


def test_a_run_of_another_tracker_is_not_gone_on_with(tmp_path: Path) -> None:
    SavedRun(tmp_path, TrackerKind.wandb).write(run_id="a")
    assert SavedRun(tmp_path, TrackerKind.wandb).read()["run_id"] == "a"
    assert SavedRun(tmp_path, TrackerKind.mlflow).read() == {}
    (tmp_path / "tracker.json").write_text("{")
    assert SavedRun(tmp_path, TrackerKind.wandb).read() == {}


def test_records_of_an_offline_file_are_read_up_to_a_torn_end() -> None:
    def fragment(kind: int, content: bytes) -> bytes:
        return struct.pack("<IHB", 0, len(content), kind) + content

    long = bytes(range(256)) * 300
    first = BLOCK - 7 - 7  # of the first block, after the file's header and the fragment's
    parts = [long[:first], long[first : first + BLOCK - 7], long[first + BLOCK - 7 :]]
    data = bytes(7) + b"".join(fragment(kind, part) for kind, part in zip((2, 3, 4), parts, strict=True))
    data += fragment(1, b"short")
    assert list(_records(data)) == [long, b"short"]
    assert list(_records(data[:-1])) == [long]
    assert list(_records(data + bytes(100))) == [long, b"short"]
