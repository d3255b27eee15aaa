"""What a sweep remembers: one JSON file with the state of each trial, written as a whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from reformer_dist.errors import ConfigError

FORMAT = 1
FILES = "sweep*.json"


class TrialStatus(Enum):
    """In order of what is known: of two files that name a trial, the higher state holds."""

    waiting = "waiting"
    running = "running"
    """Or cut with its driver, which could not say so."""
    cut = "cut"
    """Stopped, to go on from its last checkpoint."""
    pruned = "pruned"
    failed = "failed"
    finished = "finished"


DONE = (TrialStatus.finished, TrialStatus.failed, TrialStatus.pruned)


@dataclass
class Trial:
    name: str
    changed: dict[str, str]
    """Overrides by which it differs from the others."""
    state: TrialStatus = TrialStatus.waiting
    overrides: list[str] = field(default_factory=list)
    """All of its command line but its folder."""
    digest: str = ""
    """Of its whole configuration: its folder is never used for another."""
    reason: str = ""
    """Why it failed, was cut or pruned."""
    starts: int = 0
    result: dict[str, float] = field(default_factory=dict)


class SweepFile:
    """sweep.json of a driver; drivers of shards have one each, side by side."""

    def __init__(self, folder: Path, shard: tuple[int, int]) -> None:
        """Raises ConfigError where the file is there and can't be read."""
        index, count = shard
        self.folder = folder
        self._path = folder / ("sweep.json" if count == 1 else f"sweep.{index}-of-{count}.json")
        self.trials: dict[str, Trial] = {trial.name: trial for trial in _read(self._path)}

    def save(self) -> None:
        """Replaces the file at once: a reader, or a start after a kill, finds the old one or the new one."""
        trials = {name: {**asdict(trial), "state": trial.state.value} for name, trial in self.trials.items()}
        write_whole(self._path, json.dumps({"format": FORMAT, "trials": trials}, indent=1) + "\n")

    def lock(self) -> int:
        """Holds the sweep for this driver while the process lives. Raises ConfigError if another holds it."""
        descriptor = take_lock(self._path.with_suffix(".lock"))
        if descriptor is None:
            who = self._path.with_suffix(".lock").read_text().strip() or "another process"
            raise ConfigError(f"output_dir={self.folder}: {who} is at work on this sweep; wait for it, or stop it")
        return descriptor


def read_all(folder: Path) -> dict[str, Trial]:
    """What all drivers of a sweep have written. Raises ConfigError."""
    trials: dict[str, Trial] = {}
    for path in sorted(folder.glob(FILES)):
        for trial in _read(path):
            known = trials.get(trial.name)
            if known is None or _rank(trial.state) > _rank(known.state):
                trials[trial.name] = trial
    return trials


def _rank(state: TrialStatus) -> int:
    return list(TrialStatus).index(state)


def _read(path: Path) -> list[Trial]:
    if not path.exists():
        return []
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        return [Trial(**{**trial, "state": TrialStatus(trial["state"])}) for trial in content["trials"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: is not a sweep's file of this version ({error}); move it away") from error


def write_whole(path: Path, text: str) -> None:
    """Writes aside, and renames into place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def take_lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a file, None where another process has it.

    The lock lives as long as any process has the descriptor open: one that inherits it holds it on.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor
