"""RunSummary: what the files in a run directory say, without importing PyTorch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from reformer_dist.config.renamed import translate_saved
from reformer_dist.errors import ConfigError
from reformer_dist.fs.lock import is_locked
from reformer_dist.process.text_table import Cell
from reformer_dist.sweep.trial_metrics import SPEED, TIME, TRAIN_LOSS, MetricsRow, last, read_metrics, series

CONFIG_FILE, STARTS_FILE, CHECKPOINTS = "config.yaml", "starts.jsonl", "checkpoints"
HELDOUT = ("eval/loss", "eval/bits_per_byte", "eval/accuracy")
TITLES = {
    TRAIN_LOSS: "loss",
    **{tag: f"held-out {tag.removeprefix('eval/').replace('_', ' ')}" for tag in HELDOUT},
    SPEED: "tokens/s",
}
"""Metrics in a list of runs, with their titles."""


class RunState(Enum):
    running = "running"
    finished = "finished"
    stopped = "stopped"


@dataclass(frozen=True)
class RunSummary:
    """A run directory. Files are read when they are asked for."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, with renamed keys translated. Raises ConfigError."""
        path = self.folder / CONFIG_FILE
        try:
            saved = OmegaConf.to_container(OmegaConf.load(path))
        except (OSError, YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{path}: is not the configuration of a run ({type(error).__name__})") from error
        if not isinstance(saved, dict):
            raise ConfigError(f"{path}: is not the configuration of a run; it must hold keys and values")
        return translate_saved(saved)  # type: ignore[arg-type]

    @cached_property
    def metrics(self) -> list[MetricsRow]:
        """By step, in order."""
        return read_metrics(self.folder)

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """Lines of starts.jsonl; empty for runs of older versions."""
        path = self.folder / STARTS_FILE
        found = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            with suppress(ValueError):  # of a start that was killed at that moment
                found.append(json.loads(line))
        return found

    @property
    def checkpoints(self) -> list[str]:
        folder = self.folder / CHECKPOINTS
        return sorted(path.name for path in folder.glob("step-*")) if folder.is_dir() else []

    @property
    def step(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def max_steps(self) -> int:
        return int(self.config.get("trainer", {}).get("max_steps", 0))

    @property
    def state(self) -> RunState:
        if is_locked(self.folder):
            return RunState.running
        return RunState.finished if 0 < self.max_steps <= self.step else RunState.stopped

    def value_at(self, tag: str, step: int) -> float | None:
        """The last value of a metric up to a step."""
        return last([row for row in self.metrics if row["step"] <= step], tag)

    def as_row(self, name: str) -> dict[str, Cell]:
        """The row of a list of runs."""
        speeds = [value for _, value in series(self.metrics, SPEED)]
        values: dict[str, Cell] = {title: last(self.metrics, tag) for tag, title in TITLES.items()}
        values[TITLES[SPEED]] = median(speeds) if speeds else None
        seconds = last(self.metrics, TIME)
        return {
            "run": name,
            "state": self.state.value,
            "step": f"{self.step:,}/{self.max_steps:,}",
            **values,
            "hours": None if seconds is None else seconds / 3600,
            "started": self.starts[0]["time"][:16].replace("T", " ") if self.starts else None,
        }


def open_run(folder: Path) -> RunSummary:
    """Raises ConfigError unless a directory is a run's."""
    if not is_run(folder):
        problem = "is no directory" if not folder.is_dir() else f"has no {CONFIG_FILE}"
        raise ConfigError(f"{folder}: {problem}; give the output_dir of a run")
    run = RunSummary(folder)
    run.config  # noqa: B018  - refused here rather than in the middle of a table
    return run


def find_runs(folder: Path) -> list[RunSummary]:
    """The runs in a directory, at any depth, by path. Raises ConfigError if there are none."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is no directory; give one that holds runs")
    runs = [open_run(found) for found in sorted(_search(folder))]
    if not runs:
        raise ConfigError(f"{folder}: holds no runs; give the output_dir of one, or a directory above it")
    return runs


def is_run(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def _search(folder: Path) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            yield from _search(child)
