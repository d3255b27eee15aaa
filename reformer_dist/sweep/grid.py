"""A grid: every combination once, in order, each with a name of its own."""

from __future__ import annotations

import re
from collections import deque
from hashlib import blake2b
from itertools import product

from reformer_dist.errors import ConfigError
from reformer_dist.sweep.metrics import MetricsRow
from reformer_dist.sweep.space import Interval, SearchSpace
from reformer_dist.sweep.state import DONE, Trial

LONGEST_NAME = 120


def combinations(space: SearchSpace) -> list[dict[str, str]]:
    """Every combination, the last key changing fastest, each once. Raises ConfigError for an open interval."""
    columns = []
    for key, dimension in space.items():
        if isinstance(dimension, Interval):
            if dimension.step is None:
                words = f"interval({dimension.low:g},{dimension.high:g})"
                right = "has no end of values: give choices such as 1,2,4 or range(1,9), or search by sweep=optuna"
                raise ConfigError(f"{key}={words}: {right}")
            columns.append(dimension.values())
        else:
            columns.append(dimension.values)
    found = [dict(zip(space, values, strict=True)) for values in product(*columns)]
    return list({tuple(each.items()): each for each in found}.values())


def trial_name(changed: dict[str, str]) -> str:
    """Folder name of a trial: its overrides, in characters that neither a shell nor Hydra's grammar reads.

    `model.n_hashes-4+optim.lr-0.001`. Where characters had to go, or the name is too long, a mark of the whole
    is put behind it.
    """
    whole = "+".join(f"{key.lstrip('+')}={value}" for key, value in changed.items())
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", "-", whole.replace("=", "-")).strip("-")
    is_lossy = re.search(r"[^A-Za-z0-9_.+=-]", whole) is not None
    if not is_lossy and len(plain) <= LONGEST_NAME:
        return plain
    return f"{plain[:LONGEST_NAME]}-{blake2b(whole.encode(), digest_size=4).hexdigest()}"


class GridSearch:
    """Runs the trials that are still to run."""

    def __init__(self, trials: list[Trial]) -> None:
        """trials: all of this driver; those that are done are passed over."""
        self._waiting = deque(trial for trial in trials if trial.state not in DONE)
        self._n_done = len(trials) - len(self._waiting)

    def describe(self) -> str:
        return f"{len(self._waiting) + self._n_done} trials, {len(self._waiting)} of them to run"

    def next(self) -> Trial | None:
        return self._waiting.popleft() if self._waiting else None

    def should_prune(self, trial: Trial, rows: list[MetricsRow]) -> bool:
        return False

    def ended(self, trial: Trial) -> None:
        pass
