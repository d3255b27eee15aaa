"""The live line of a terminal: phases, progress and figures within its width, and the log above it."""

from __future__ import annotations

import io
import sys

import pytest
from support.terminal import terminal

from reformer_dist.process import log
from reformer_dist.process.live_line import LiveLine, live
from reformer_dist.process.log import logger

FIGURES = ["loss 1.234", "ETA 3m20s", "12,345 tokens/s", "data wait 0%", "3.2 GiB", "grad norm 0.45", "lr 3.0e-04"]


def drive(columns: int) -> list[str]:
    with terminal(columns) as screen, live.shown():
        with live.phase("importing"):
            pass
        live.progress(1, 8)
        live.figures(FIGURES)
        with live.phase("evaluating"):
            live.progress(2, 8)
    return screen.frames


def test_phase_progress_and_figures() -> None:
    frames = drive(200)
    assert frames[0] == "importing"
    assert any(frame.endswith(" | ".join(FIGURES)) and frame.startswith("1/8  12% |") for frame in frames)
    assert any(frame.startswith("evaluating ") and "loss 1.234" in frame for frame in frames)


def test_items_are_counted_beside_the_phase() -> None:
    with terminal(60) as screen, live.shown(), live.phase("cutting shards"):
        assert list(live.counted(iter("abc"), "documents")) == ["a", "b", "c"]
    assert "cutting shards: 1 documents" in screen.frames
    assert live._count == ""


@pytest.mark.parametrize("columns", [20, 47, 80])
def test_the_line_fits_the_terminal(columns: int) -> None:
    frames = drive(columns)
    assert max(map(len, frames)) <= columns
    assert any(frame.startswith("evaluating") for frame in frames)


def test_the_log_is_above_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", False)
    with terminal(60) as screen:
        log.configure()
        with live.shown():
            live.progress(1, 8)
            logger.info("saved a checkpoint")
            live.progress(2, 8)
    said = screen.frames.index("saved a checkpoint")  # alone on its line
    assert "\nsaved a checkpoint" not in screen.text  # the line was removed: the cursor stood at its start
    assert screen.frames[-1].startswith("2/8") and said < len(screen.frames) - 1  # the last figures stay


def test_without_a_terminal_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    line = LiveLine()
    with line.shown(), line.phase("importing"):
        line.progress(1, 2)
        assert not line.is_shown
    assert output.getvalue() == ""


def test_only_rank_0_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with terminal(60), live.shown():
        assert not live.is_shown
