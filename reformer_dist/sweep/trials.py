"""State of a sweep on disk: one JSON file with the status of each trial, replaced atomically."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from reformer_dist.errors import ConfigError
from reformer_dist.fs.atomic import write_atomic
from reformer_dist.fs.lock import acquire_lock

FORMAT = 1
FILES = "sweep*.json"


class TrialStatus(Enum):
    """In ascending order of precedence: if two files list the same trial, the later status wins."""

    waiting = "waiting"
    running = "running"
    """Or killed together with its driver, before that could be recorded."""
    interrupted = "interrupted"
    """Resumes from its last checkpoint."""
    pruned = "pruned"
    failed = "failed"
    finished = "finished"

    @classmethod
    def _missing_(cls, value: object) -> TrialStatus | None:
        return cls.interrupted if value == "cut" else None  # the name in files of earlier versions


ENDED = (TrialStatus.finished, TrialStatus.failed, TrialStatus.pruned)


@dataclass
class Trial:
    name: str
    changed: dict[str, str]
    """Overrides that distinguish it from the other trials."""
    state: TrialStatus = TrialStatus.waiting
    overrides: list[str] = field(default_factory=list)
    """Its overrides on the command line, without output_dir."""
    digest: str = ""
    """Hash of the resolved configuration; a folder is never reused for another configuration."""
    reason: str = ""
    """Why it failed, or was interrupted or pruned."""
    starts: int = 0
    result: dict[str, float] = field(default_factory=dict)


class SweepFile:
    """sweep.json of a driver; each shard's driver has its own file."""

    def __init__(self, folder: Path, shard: tuple[int, int]) -> None:
        """Raises ConfigError if the file exists but can't be read."""
        index, count = shard
        self.folder = folder
        self._path = folder / ("sweep.json" if count == 1 else f"sweep.{index}-of-{count}.json")
        self.trials: dict[str, Trial] = {trial.name: trial for trial in _read(self._path)}

    def save(self) -> None:
        """Replaces the file atomically: readers see either the old or the new one, also after a kill."""
        trials = {name: {**asdict(trial), "state": trial.state.value} for name, trial in self.trials.items()}
        write_atomic(self._path, json.dumps({"format": FORMAT, "trials": trials}, indent=1) + "\n")

    def lock(self) -> int:
        """Locks the sweep until the process ends. Raises ConfigError if another driver holds the lock."""
        descriptor = acquire_lock(self._path.with_suffix(".lock"))
        if descriptor is None:
            holder = self._path.with_suffix(".lock").read_text().strip() or "another process"
            raise ConfigError(f"output_dir={self.folder}: {holder} is running this sweep; wait for it, or stop it")
        return descriptor


def read_all(folder: Path) -> dict[str, Trial]:
    """Trials of all drivers of a sweep by name. Raises ConfigError."""
    order, trials = list(TrialStatus), dict[str, Trial]()
    for path in sorted(folder.glob(FILES)):
        for trial in _read(path):
            known = trials.get(trial.name)
            if known is None or order.index(trial.state) > order.index(known.state):
                trials[trial.name] = trial
    return trials


def _read(path: Path) -> list[Trial]:
    if not path.exists():
        return []
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        return [Trial(**{**trial, "state": TrialStatus(trial["state"])}) for trial in content["trials"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a sweep file of this version ({error}); move it away") from error
