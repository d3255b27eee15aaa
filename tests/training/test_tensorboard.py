"""TensorBoard curves: one value per step, also after an interruption, from one rank."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.events import read_events

from reformer_dist.training.metrics_log import MetricsLogger
from reformer_dist.training.tensorboard import TensorBoardWriter


def write(run: Path, resume_step: int, steps: range, value: float) -> None:
    board = TensorBoardWriter(run / "tensorboard", resume_step)
    for step in steps:
        board.scalars({"loss": value}, step)
    board.close()


def test_what_lies_beyond_the_checkpoint_is_taken_back(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 6), 1.0)
    write(tmp_path, 3, range(5, 7), 2.0)  # step 4 is not reported this time
    events = read_events(tmp_path).Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 1.0), (3, 1.0), (5, 2.0), (6, 2.0)]


def test_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    board = TensorBoardWriter(tmp_path / "tensorboard", resume_step=0)
    board.text("sample", "# no title\n\n* no list", 7)
    board.flush()
    [event] = read_events(tmp_path).Tensors("sample/text_summary")
    assert event.tensor_proto.string_val[0].decode() == "    # no title\n    \n    * no list\n"
    board.close()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = MetricsLogger(tmp_path, is_active=False, resume_step=0)
    metrics.scalars({"loss": 1.0}, 1, 1.0)
    metrics.text("sample", "text", 1)
    metrics.end_step()
    metrics.flush()
    metrics.close()
    assert not list(tmp_path.iterdir())


def test_a_clock_that_went_back_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers order files by the times in their names; other writers name whole seconds."""
    now = time.time()
    write(tmp_path, 0, range(1, 6), 1.0)
    foreign = next((tmp_path / "tensorboard").iterdir())
    foreign.rename(foreign.with_name(f"events.out.tfevents.{int(now) + 7}.host.1.0"))
    for resume_step, earlier in ((3, 3600), (4, 7200)):
        monkeypatch.setattr(time, "time", lambda earlier=earlier: now - earlier)
        write(tmp_path, resume_step, range(resume_step + 1, 7), 2.0)
    events = read_events(tmp_path).Scalars("loss")
    assert [(event.step, event.value) for event in events] == [
        *((step, 1.0) for step in (1, 2, 3)),
        *((step, 2.0) for step in (4, 5, 6)),
    ]
