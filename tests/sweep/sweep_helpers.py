"""Writes the output files of trials."""

from __future__ import annotations

import json
from pathlib import Path

from reformer_dist.training.metrics_log import METRICS_FILE


def write_metrics(folder: Path, *rows: dict[str, float | None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
