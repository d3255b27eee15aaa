"""Metrics of the window between two reports, and the progress line."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

from reformer_dist.training.metrics import (
    MetricsWindow,
    WindowMetrics,
    bits_per_byte,
    duration,
    peak_memory_gib,
    progress_figures,
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
    window.exclude_time(6.0)
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


def test_progress_figures() -> None:
    numbers: dict[str, Any] = {"grad_norm": 0.456, "lr": 0.0003, "memory_gib": 12.34}
    metrics = WindowMetrics(1.3556, 12345.6, 0.5, 0.034)
    figures = progress_figures(
        metrics, steps_left=960, bpb=1.9557, mfu=0.4123, counts={"skipped": 0, "failed saves": 0}, **numbers
    )
    speed = ["12,346 tokens/s", "MFU 41.2%", "data wait 3%", "12.3 GiB"]
    assert figures == ["loss 1.356", "bits per byte 1.956", "ETA 8m00s", *speed, "grad norm 0.46", "lr 3.0e-04"]
    counts = {"skipped": 2, "failed saves": 1}
    figures = progress_figures(metrics, steps_left=0, bpb=None, mfu=None, counts=counts, **numbers)
    assert figures[:5] == ["loss 1.356", "ETA 0s", "skipped 2", "failed saves 1", "12,346 labels/s"]
    assert "MFU" not in " ".join(figures)


def test_the_wait_for_data_survives_a_resume(clock: list[float]) -> None:
    window = MetricsWindow(CPU)
    clock[0] += 4.0
    window.add_data_wait(1.0)
    window.add(torch.tensor(1.0), 1.0, was_skipped=False)
    resumed = MetricsWindow(CPU)
    resumed.load_state(window.state)
    assert resumed.result(1.0).data_wait == window.result(1.0).data_wait == 0.25
    older = {name: value for name, value in window.state.items() if name != "waited"}
    resumed.load_state(older)
    assert resumed.result(1.0).data_wait == 0.0


def test_flops_of_steps_of_different_cost(clock: list[float]) -> None:
    """As at the border of two stages; the sum is kept over a resume."""
    window, resumed = MetricsWindow(CPU), MetricsWindow(CPU)
    window.add(torch.tensor(1.0), 1.0, was_skipped=False, flops=3e12)
    clock[0] += 1.0
    resumed.load_state(window.state)
    resumed.add(torch.tensor(1.0), 1.0, was_skipped=False, flops=9e12)
    clock[0] += 2.0
    assert resumed.result(2.0).flops_per_s == pytest.approx(4e12)
