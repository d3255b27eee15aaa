"""Writes the output files of trials."""

from __future__ import annotations

import json
from pathlib import Path

from reformer_dist.sweep import trial_metrics


def write_metrics(folder: Path, *rows: dict[str, float | None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / trial_metrics.FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
