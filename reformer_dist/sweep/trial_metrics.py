"""Metrics that a trial has written to metrics.jsonl, and their summary for the results table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

from reformer_dist.training.metrics_log import METRICS_FILE, read_rows

COVERAGE, TASK = "coverage.json", "task.json"
TIME, TRAIN_LOSS, SPEED = "time_s", "train/loss", "perf/tokens_per_s"

MetricsRow = dict[str, float]  # metrics of one step by tag


def read_metrics(folder: Path) -> list[MetricsRow]:
    """Metrics by step, in order. Skips incomplete lines; for repeated steps the last value of a tag wins."""
    try:
        rows = read_rows(folder / METRICS_FILE)
    except OSError:
        return []
    by_step: dict[float, MetricsRow] = {}
    for row in rows:
        # non-finite values are written as null
        values = {tag: math.nan if value is None else value for tag, value in row.items()}
        by_step.setdefault(values["step"], {}).update(values)
    return [by_step[step] for step in sorted(by_step)]


def series(rows: list[MetricsRow], tag: str) -> list[tuple[int, float]]:
    """(step, value) pairs of a tag."""
    return [(int(row["step"]), row[tag]) for row in rows if tag in row]


def last(rows: list[MetricsRow], tag: str) -> float | None:
    """Last finite value of a tag."""
    values = [value for _, value in series(rows, tag) if math.isfinite(value)]
    return values[-1] if values else None


def summarize(rows: list[MetricsRow], objective: str) -> dict[str, float]:
    """The last step, last values of the objective, held-out metrics and training loss, and the median speed."""
    if not rows:
        return {}
    measured = [tag for row in rows for tag in row if tag.startswith("eval/")]
    tags = dict.fromkeys((objective, *measured, TRAIN_LOSS))
    summary = {tag: last(rows, tag) for tag in tags}
    speeds = [value for _, value in series(rows, SPEED)]
    if speeds:
        summary[SPEED] = median(speeds)
    return {"step": rows[-1]["step"], **{tag: value for tag, value in summary.items() if value is not None}}


def read_evaluations(folder: Path) -> dict[str, float]:
    """Attention coverage and task metrics as written by `reformer_dist.evaluate`, of those that were measured."""
    coverage, task = (_read_json(folder / name) for name in (COVERAGE, TASK))
    values = {f"coverage/{name}": coverage[name] for name in ("mass", "pairs") if coverage}
    return values | {f"task/{name}": value for name, value in task.get("task", {}).items()}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none, or if its process was killed."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
