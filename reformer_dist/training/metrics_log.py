"""MetricsLogger: scalars to metrics.jsonl and a tracker, each step once, also after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reformer_dist.config import TrackerConfig, TrackerKind
from reformer_dist.fs.append import AppendFile
from reformer_dist.fs.atomic import write_atomic
from reformer_dist.training.tensorboard import TensorBoardWriter
from reformer_dist.training.tracker import Row, RowTracker, RunDescription, Tracker, require_tracker

METRICS_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "tensorboard"


class MetricsLogger:
    """Logs scalars, texts and histograms in ascending steps; does nothing on ranks other than 0.

    Removes what an interrupted run logged after the step from which this one resumes, or sends it only once.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_active: bool,
        resume_step: int,
        tracker: TrackerConfig | None = None,
        run: RunDescription | None = None,
    ) -> None:
        """run: for a tracker other than TensorBoard. Raises OSError, and UserError if the tracker refuses."""
        self._is_active = is_active
        if not is_active:
            return
        self._metrics = MetricsFile(folder / METRICS_FILE, resume_step)
        self._tracker: Tracker
        if tracker is None or tracker.kind is TrackerKind.tensorboard:
            self._tracker = TensorBoardWriter(folder / TENSORBOARD_FOLDER, resume_step)
            return
        assert run is not None
        rows = _open_row_tracker(tracker, run)
        rows.send_missing(read_rows(folder / METRICS_FILE))
        self._tracker = rows

    def scalars(self, values: dict[str, float], step: int, seconds: float) -> None:
        """seconds: time spent training, over all resumes."""
        if self._is_active:
            self._tracker.scalars(values, step, seconds)
            self._metrics.add(values, step, seconds)

    def text(self, name: str, text: str, step: int) -> None:
        if self._is_active:
            self._tracker.text(name, text, step)

    def histogram(self, name: str, values: NDArray[np.float64], step: int) -> None:
        if self._is_active:
            self._tracker.histogram(name, values, step)

    def end_step(self) -> None:
        """Writes the line of the step, whose scalars are complete."""
        if self._is_active:
            self._metrics.write()
            self._tracker.end_step()

    def flush(self) -> None:
        """Syncs everything to disk. Raises OSError if that fails."""
        if self._is_active:
            self._tracker.flush()
            self._metrics.flush()

    def close(self) -> None:
        if self._is_active:
            self._tracker.close()
            self._metrics.close()


def _open_row_tracker(tracker: TrackerConfig, run: RunDescription) -> RowTracker:
    """Imports the tracker's package. Raises UserError."""
    require_tracker(tracker)
    if tracker.kind is TrackerKind.wandb:
        from reformer_dist.training.wandb_tracker import WandbTracker

        return WandbTracker(tracker, run)
    from reformer_dist.training.mlflow_tracker import MlflowTracker

    return MlflowTracker(tracker, run)


class MetricsFile:
    """JSON lines with "step", "time_s" (seconds of training over all resumes) and scalars by tag.

    Values that are not finite are null. While the disk is full, lines are kept in memory.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        """Raises OSError if the file can't be written."""
        self._path = path
        self._row: Row = {}
        self._last = truncate_rows(path, resume_step)
        self._file = AppendFile(path)

    def add(self, values: dict[str, float], step: int, seconds: float) -> None:
        if self._row.get("step", step) != step:
            self.write()
        if self._last.get("step") == step:  # the interrupted evaluation of a resumed step: joins its line
            self._file.close()
            truncate_rows(self._path, step - 1)
            self._file = AppendFile(self._path)
            self._row = self._last
        self._last = {}
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._row = {"step": step, "time_s": seconds, **self._row, **finite}

    def write(self) -> None:
        """Appends the line of the current step."""
        if self._row:
            self._file.write(json.dumps(self._row).encode() + b"\n")
            self._row = {}

    def flush(self) -> None:
        self.write()
        self._file.sync()

    def close(self) -> None:
        self.write()
        self._file.close()


def truncate_rows(path: Path, last_step: int) -> Row:
    """Removes rows after `last_step` and torn lines; returns the row of `last_step`, {} if there is none."""
    if not path.is_file():
        return {}
    kept = [row for row in read_rows(path) if (row["step"] or 0) <= last_step]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept[-1] if kept and kept[-1]["step"] == last_step else {}


def read_rows(path: Path) -> list[Row]:
    """The rows of metrics.jsonl, without torn lines. Raises OSError."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
