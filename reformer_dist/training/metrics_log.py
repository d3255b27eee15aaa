"""What a run writes down: metrics.jsonl for programs, TensorBoard for the eye; each step once."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from reformer_dist.fs.append import PatientFile
from reformer_dist.training.tensorboard import TensorBoardWriter

METRICS_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "tensorboard"


class MetricsLogger:
    """Scalars and texts by step, in steps that rise; on ranks other than 0 it does nothing.

    What an interrupted run wrote beyond the step that this one goes on from is taken back.
    """

    def __init__(self, folder: Path, *, is_active: bool, first_step: int) -> None:
        self._board = TensorBoardWriter(folder / TENSORBOARD_FOLDER, is_active=is_active, first_step=first_step)
        self._metrics = MetricsFile(folder / METRICS_FILE, first_step) if is_active else None

    def scalars(self, values: dict[str, float], step: int, seconds: float) -> None:
        """seconds: of training, over the whole run."""
        self._board.scalars(values, step)
        if self._metrics is not None:
            self._metrics.add(values, step, seconds)

    def text(self, name: str, text: str, step: int) -> None:
        self._board.text(name, text, step)

    def end_step(self) -> None:
        """All scalars of the step are told: its line can be read."""
        if self._metrics is not None:
            self._metrics.write()

    def flush(self) -> None:
        """All that was told is on the disk. Raises OSError where it can't be."""
        self._board.flush()
        if self._metrics is not None:
            self._metrics.flush()

    def close(self) -> None:
        self._board.close()
        if self._metrics is not None:
            self._metrics.close()


class MetricsFile:
    """A JSON object in each line: "step", "time_s" (seconds of training, resumes included) and scalars by tag.

    A value that is no finite number is null. Where the disk is full, lines wait for it.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        """Raises OSError where the file can't be written."""
        self._path = path
        self._row: dict[str, float | None] = {}
        self._last = _take_back(path, first_step)
        self._file = PatientFile(path)

    def add(self, values: dict[str, float], step: int, seconds: float) -> None:
        if self._row.get("step", step) != step:
            self.write()
        if self._last.get("step") == step:  # an evaluation that was interrupted is made up for
            self._file.close()
            _take_back(self._path, step - 1)
            self._file = PatientFile(self._path)
            self._row = self._last
        self._last = {}
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._row = {"step": step, "time_s": seconds, **self._row, **finite}

    def write(self) -> None:
        """The step is complete."""
        if self._row:
            self._file.write(json.dumps(self._row).encode() + b"\n")
            self._row = {}

    def flush(self) -> None:
        self.write()
        self._file.sync()

    def close(self) -> None:
        self.write()
        self._file.close()


def _take_back(path: Path, last_step: int) -> dict[str, float | None]:
    """Cuts a file behind `last_step`, and any torn line; returns that step's row, {} if there is none."""
    if not path.is_file():
        return {}
    kept = [row for row in _read(path) if (row["step"] or 0) <= last_step]
    shorter = path.with_name(f".{path.name}.partial")
    with shorter.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    shorter.replace(path)
    return kept[-1] if kept and kept[-1]["step"] == last_step else {}


def _read(path: Path) -> list[dict[str, float | None]]:
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
