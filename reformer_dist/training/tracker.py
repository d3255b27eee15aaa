"""Trackers of experiments other than TensorBoard, to which each row of metrics.jsonl is sent once.

What they have stored can't be taken back, as a line of metrics.jsonl can. So a resumed run asks what the tracker
has: rows that an interrupted run has sent are not sent again, and rows that it could not send are sent now.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reformer_dist.config import TrackerConfig, TrackerKind
from reformer_dist.errors import ConfigError
from reformer_dist.fs.atomic import write_atomic
from reformer_dist.process.log import logger

TRACKER_FILE = "tracker.json"
Row = dict[str, float | None]
"""Scalars of a step by tag, besides "step" and "time_s"."""


class Tracker(Protocol):
    """Receives the metrics of a run in ascending steps, on rank 0."""

    def scalars(self, values: Mapping[str, float], step: int, seconds: float) -> None: ...

    def text(self, name: str, text: str, step: int) -> None: ...

    def histogram(self, name: str, values: NDArray[np.float64], step: int) -> None: ...

    def end_step(self) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class RunDescription:
    """What a tracker shows of a run."""

    folder: Path
    """The run directory."""
    name: str
    config: dict[str, Any]
    """The resolved configuration as JSON values."""


@dataclass
class TrackedStep:
    """All that a step has to show."""

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    histograms: dict[str, NDArray[np.float64]] = field(default_factory=dict)


class RowTracker(ABC):
    """Sends each step as a whole, once it is complete: its evaluation may be repeated after an interruption."""

    kind: TrackerKind

    def __init__(self) -> None:
        self._current: TrackedStep | None = None
        self._unsent: list[TrackedStep] = []
        self._is_failing = False

    def send_missing(self, rows: Sequence[Row]) -> None:
        """rows: those of metrics.jsonl up to the step from which the run goes on, sent unless they were before."""
        for row in rows:
            step, values = int(row["step"] or 0), {tag: row[tag] for tag in row if tag != "step"}
            self._begin(step).scalars |= {tag: value for tag, value in values.items() if value is not None}
        # the last row stays until `end_step`: its evaluation may have been interrupted

    def scalars(self, values: Mapping[str, float], step: int, seconds: float) -> None:
        finite = {tag: value for tag, value in values.items() if math.isfinite(value)}
        scalars = self._begin(step).scalars
        scalars |= {"time_s": scalars.get("time_s", seconds), **finite}

    def text(self, name: str, text: str, step: int) -> None:
        self._begin(step).texts[name] = text

    def histogram(self, name: str, values: NDArray[np.float64], step: int) -> None:
        self._begin(step).histograms[name] = values

    def end_step(self) -> None:
        """Sends the step. A tracker that can't be reached costs a warning; the next call tries again."""
        if self._current is not None:
            self._unsent.append(self._current)
            self._current = None
        self._send_all()

    def flush(self) -> None:  # noqa: B027
        """Nothing: what a killed run has not sent is sent by the next one."""

    def close(self) -> None:
        """Leaves out a step that is not complete: the next run repeats its evaluation."""
        self._send_all()
        if self._unsent:
            n_unsent = f"{len(self._unsent)} steps were not sent"
            logger.warning(f"tracker={self.kind.name}: {n_unsent}; a resumed run sends them from metrics.jsonl")
        self._reach(self._finish, "the run could not be ended")

    def _send_all(self) -> None:
        def send() -> None:
            while self._unsent:
                self._send(self._unsent[0])
                self._unsent.pop(0)

        self._reach(send, "metrics could not be sent, each step tries again")

    def _reach(self, action: Callable[[], None], failure: str) -> None:
        """Runs `action`; a tracker that can't be reached costs one warning, and never the run."""
        try:
            action()
        except Exception as error:  # of any library below the tracker's
            if not self._is_failing:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                logger.warning(f"tracker={self.kind.name}: {failure} ({reason})")
            self._is_failing = True
        else:
            self._is_failing = False

    def _begin(self, step: int) -> TrackedStep:
        if self._current is not None and self._current.step != step:
            self.end_step()
        if self._current is None:
            self._current = TrackedStep(step)
        return self._current

    @abstractmethod
    def _send(self, step: TrackedStep) -> None:
        """Sends what the tracker has not stored yet."""

    @abstractmethod
    def _finish(self) -> None: ...


def require_tracker(config: TrackerConfig) -> None:
    """Raises ConfigError, with the command that installs it, if the tracker's package is missing."""
    kind = config.kind.name
    if config.kind is not TrackerKind.tensorboard and find_spec(kind) is None:
        raise ConfigError(f"tracker={kind}: its package is not installed; pip install 'reformer_dist[{kind}]'")


class SavedRun:
    """The tracker's run, in a file of the run directory: every resume goes on with it."""

    def __init__(self, folder: Path, kind: TrackerKind) -> None:
        self._path, self._kind = folder / TRACKER_FILE, kind.name

    def read(self) -> dict[str, Any]:
        """Empty without a run of this tracker."""
        try:
            saved = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return saved if isinstance(saved, dict) and saved.get("kind") == self._kind else {}

    def write(self, **values: Any) -> None:
        write_atomic(self._path, json.dumps({"kind": self._kind, **values}) + "\n")
