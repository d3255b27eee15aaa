"""metrics.jsonl: one line per step, also after an interruption, with unrounded values."""

from __future__ import annotations

import json
import math
from pathlib import Path

from reformer_dist.training.metrics_log import METRICS_FILE, MetricsFile


def rows(folder: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def write(folder: Path, resume_step: int, steps: range, value: float) -> None:
    file = MetricsFile(folder / METRICS_FILE, resume_step)
    for step in steps:
        file.add({"train/loss": value}, step, 10.0 * step)
        file.add({"eval/loss": value + 1}, step, 10.0 * step)
    file.write()
    file.close()


def test_a_line_holds_all_of_a_step(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 3), 0.1)
    assert rows(tmp_path) == [
        {"step": step, "time_s": 10.0 * step, "train/loss": 0.1, "eval/loss": 1.1} for step in (1, 2)
    ]


def test_what_lies_beyond_the_checkpoint_is_taken_back(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 6), 1.0)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 6, "train/l')  # killed while it wrote
    write(tmp_path, 3, range(5, 7), 2.0)  # step 4 is not reported this time
    assert [(row["step"], row["train/loss"]) for row in rows(tmp_path)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (5, 2.0),
        (6, 2.0),
    ]


def test_an_interrupted_evaluation_joins_its_step(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / METRICS_FILE, 0)
    file.add({"train/loss": 1.0}, 1, 1.0)
    file.write()
    file.close()
    file = MetricsFile(tmp_path / METRICS_FILE, 1)
    file.add({"eval/loss": 2.0}, 1, 1.0)
    file.write()
    file.close()
    assert rows(tmp_path) == [{"step": 1, "time_s": 1.0, "train/loss": 1.0, "eval/loss": 2.0}]


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 2), math.nan)
    assert rows(tmp_path)[0]["train/loss"] is None
