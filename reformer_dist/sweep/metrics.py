"""What a trial wrote into its metrics.jsonl, and what is left of it in a table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median

FILE, COVERAGE = "metrics.jsonl", "coverage.json"
TIME, TRAIN_LOSS, SPEED = "time_s", "train/loss", "perf/tokens_per_s"

MetricsRow = dict[str, float]


def read_metrics(folder: Path) -> list[MetricsRow]:
    """What a trial has written, by step; torn lines are left out, and what is written again counts."""
    try:
        lines = (folder / FILE).read_text().splitlines()
    except OSError:
        return []
    by_step: dict[float, MetricsRow] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int | float):
            # null is a value that was not finite
            numbers = {tag: math.nan if value is None else value for tag, value in row.items()}
            by_step.setdefault(row["step"], {}).update(numbers)
    return [by_step[step] for step in sorted(by_step)]


def series(rows: list[MetricsRow], tag: str) -> list[tuple[int, float]]:
    """(step, value) of a tag."""
    return [(int(row["step"]), row[tag]) for row in rows if tag in row]


def last(rows: list[MetricsRow], tag: str) -> float | None:
    """Last value of a tag that is a number."""
    values = [value for _, value in series(rows, tag) if math.isfinite(value)]
    return values[-1] if values else None


def summarise(rows: list[MetricsRow], objective: str) -> dict[str, float]:
    """The last step, the last value of the objective and of the losses, and the median speed."""
    if not rows:
        return {}
    tags = dict.fromkeys((objective, "eval/loss", "eval/bits_per_byte", TRAIN_LOSS))
    found = {tag: last(rows, tag) for tag in tags}
    speeds = [value for _, value in series(rows, SPEED)]
    if speeds:
        found[SPEED] = median(speeds)
    return {"step": rows[-1]["step"], **{tag: value for tag, value in found.items() if value is not None}}


def read_coverage(folder: Path) -> dict[str, float]:
    """What reformer_dist.evaluate found, if it was asked."""
    try:
        found = json.loads((folder / COVERAGE).read_text())
    except (OSError, ValueError):
        return {}
    return {f"coverage/{name}": found[name] for name in ("mass", "pairs")}
