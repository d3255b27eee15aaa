"""Metrics of the window between two reports, and the progress line."""

from __future__ import annotations

import math
import time

import pytest
import torch

from reformer_dist.training.metrics import (
    MetricsWindow,
    WindowMetrics,
    bits_per_byte,
    duration,
    peak_memory_gib,
    progress_line,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0s"),
        (44.6, "45s"),
        (59.6, "1m00s"),
        (200, "3m20s"),
        (3599.7, "1h00m"),
        (3725, "1h02m"),
        (360_000, "100h00m"),
    ],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_bits_per_byte() -> None:
    assert bits_per_byte(math.log(2) * 12, 4) == pytest.approx(3.0)
    assert math.isnan(bits_per_byte(1.0, 0))


def test_memory_of_this_process() -> None:
    assert 0.05 < peak_memory_gib(CPU) < 64


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The current time, which tests set by clock[0]."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_window(clock: list[float]) -> None:
    window = MetricsWindow(CPU)
    for loss in (3.0, 5.0):
        window.add(torch.tensor(loss), 4.0, was_skipped=False)
    clock[0] += 10.0
    window.pause(6.0)
    result = window.result(2 * window.local_loss)  # of two ranks with equal losses
    assert result == WindowMetrics(loss=2.0, tokens_per_s=2.0, seconds_per_step=2.0)
    window.reset()
    window.add(torch.tensor(7.0), 7.0, was_skipped=False)
    clock[0] += 1.0
    assert window.result(window.local_loss) == WindowMetrics(1.0, 7.0, 1.0)


def test_skipped_steps_take_time_but_have_no_loss(clock: list[float]) -> None:
    window = MetricsWindow(CPU)
    window.add(torch.tensor(math.inf), 4.0, was_skipped=True)
    clock[0] += 1.0
    assert math.isnan(window.result(window.local_loss).loss)
    window.add(torch.tensor(8.0), 4.0, was_skipped=False)
    clock[0] += 1.0
    assert window.result(window.local_loss) == WindowMetrics(2.0, 4.0, 1.0)


def test_an_empty_window_divides_by_nothing(clock: list[float]) -> None:
    assert math.isnan(MetricsWindow(CPU).result(0.0).loss)


def test_progress_line() -> None:
    numbers = {"bpb": 1.9557, "grad_norm": 0.456, "lr": 0.0003}
    line = progress_line(40, 1000, WindowMetrics(1.3556, 12345.6, 0.5), skipped=0, failed_saves=0, **numbers)
    expected = ["step   40/1000", "loss 1.356", "bits per byte 1.956", "12,346 tokens/s", "grad norm 0.46"]
    assert line.split(" | ") == [*expected, "lr 3.0e-04", "ETA 8m00s"]
    assert progress_line(9, 9, WindowMetrics(1.0, 1.0, 1.0), skipped=2, failed_saves=1, **numbers).endswith(
        "ETA 0s | skipped 2 | failed saves 1"
    )
