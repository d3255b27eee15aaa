"""Profiles of a run's steps: traces, and a table of their time by part that adds up."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from run_helpers import LOSS, train
from support.events import scalars

from reformer_dist.config import TrainerConfig
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import ConfigError
from reformer_dist.ops.profiling import PREFIX
from reformer_dist.training.trace_table import TimeTable, time_by_part

TRACE, TABLE = "profile/rank-00000.steps-{}.json.gz", "profile/rank-00000.steps-{}.txt"
MODEL = {"data", "embedding", "projections", "hash", "sort", "attend", "feed-forward", "loss", "optimizer"}


def read_table(run: Path, steps: str) -> tuple[dict[str, float], float, float]:
    """Milliseconds by part, their sum, and the milliseconds measured."""
    lines = (run / TABLE.format(steps)).read_text().splitlines()
    parts = {line.split()[0]: float(line.split()[1]) for line in lines[1:-1]}
    total = re.match(r"sum +([\d.]+) +of ([\d.]+) ms measured", lines[-1])
    assert total is not None
    return parts, float(total[1]), float(total[2])


@pytest.mark.parametrize("recompute", ["reversible", "none"])
def test_the_table_adds_up_to_the_time_of_the_step(
    recompute: str, tiny_data: Path, tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture
) -> None:
    run = train(job, tiny_data, tmp_path / "run", "trainer.profile=[2,3]", f"model.recompute={recompute}")
    parts, total, measured = read_table(run, "2-3")
    assert set(parts) >= MODEL
    assert sum(parts.values()) == pytest.approx(total, abs=0.1)
    assert total == pytest.approx(measured, rel=0.05)
    assert any("profile of steps 2 to 3" in message and "feed-forward" in message for message in said.messages)
    with gzip.open(run / TRACE.format("2-3"), "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event["name"] == f"{PREFIX}step" for event in events if event["ph"] == "X") == 2


def test_a_profile_changes_no_result(whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime) -> None:
    run = train(job, tiny_data, tmp_path / "run", "trainer.profile=[1,1]")
    assert scalars(run, LOSS) == scalars(whole, LOSS)
    assert read_table(run, "1-1")[1] > 0


def test_a_resumed_run_profiles_the_steps_that_are_left(
    whole: Path, tiny_data: Path, tmp_path: Path, job: Runtime
) -> None:
    run = train(job, tiny_data, tmp_path / "run", "trainer.max_steps=3")
    train(job, tiny_data, run, "trainer.profile=[2,5]")
    assert [path.name for path in sorted((run / "profile").glob("*.txt"))] == ["rank-00000.steps-4-5.txt"]


@pytest.mark.parametrize("steps", [[1], [0, 3], [4, 3], [3, 11], [1, 2, 3]])
def test_steps_that_can_not_be_profiled_are_refused(steps: list[int]) -> None:
    with pytest.raises(ConfigError, match=rf"^trainer\.profile={re.escape(str(steps))}: .*max_steps=10"):
        TrainerConfig(max_steps=10, profile=steps)


def span(cat: str, name: str, start: float, end: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": tid, "args": args}


def mark(name: str, start: float, end: float) -> dict[str, Any]:
    return span("user_annotation", f"{PREFIX}{name}", start, end)


def link(kind: str, number: int, time: float, tid: int) -> dict[str, Any]:
    return {"ph": kind, "cat": "fwdbwd", "name": "fwdbwd", "id": number, "ts": time, "tid": tid}


def test_nested_parts_and_the_backward_of_their_operations() -> None:
    events = [
        mark("step", 0, 1000),
        mark("data", 0, 100),
        mark("forward", 100, 500),
        mark("feed-forward", 200, 400),
        span("cpu_op", "aten::mm", 250, 300),
        link("s", 7, 250, 1),
        mark("backward", 500, 900),
        span("cpu_op", "MmBackward0", 600, 700),
        link("f", 7, 600, 1),
    ]
    expected = {"data": 0.1, "forward": 0.2, "feed-forward": 0.3, "backward": 0.3, "other": 0.1}
    assert time_by_part(events, [0.001]).parts == pytest.approx(expected)
    with pytest.raises(ValueError, match="1 steps"):
        time_by_part(events, [0.001, 0.001])


def test_the_time_of_a_gpu_belongs_to_the_parts_that_launched_its_kernels() -> None:
    """The kernels of backward are launched by another thread; an overlapped exchange takes no time of its own."""
    events = [
        mark("step", 0, 1000),
        mark("data", 0, 100),
        mark("attend", 100, 200),
        span("cuda_runtime", "cudaLaunchKernel", 110, 115, correlation=1),
        span("kernel", "attend", 150, 400, tid=70, correlation=1),
        mark("exchange", 200, 250),
        span("cuda_runtime", "cudaLaunchKernel", 210, 215, correlation=2),
        span("kernel", "nccl", 300, 500, tid=71, correlation=2),
        mark("loss", 250, 300),
        span("cpu_op", "aten::mm", 260, 270),
        link("s", 7, 260, 1),
        span("cpu_op", "MmBackward0", 310, 340, tid=2),
        link("f", 7, 310, 2),
        span("user_annotation", "somebody's own", 300, 350, tid=2),
        mark("backward", 300, 900) | {"tid": 2},
        span("cuda_runtime", "cudaLaunchKernel", 320, 325, tid=2, correlation=3),
        span("kernel", "mm", 600, 800, tid=70, correlation=3),
    ]
    table = time_by_part(events, [0.001])
    assert table.parts == pytest.approx(
        {"data": 0.1, "attend": 0.25, "exchange": 0.1, "loss": 0.2, "idle": 0.05 + 0.1 + 0.2}
    )
    assert table.total == pytest.approx(table.measured)


def test_a_table_shows_parts_in_the_order_of_a_step() -> None:
    shown = str(TimeTable({"other": 1.0, "loss": 3.0, "data": 4.0}, measured=8.2, n_steps=3))
    assert [line.split()[0] for line in shown.splitlines()] == ["part", "data", "loss", "other", "sum"]
    assert "37.5%" in shown
    assert shown.endswith("of 8.20 ms measured")
