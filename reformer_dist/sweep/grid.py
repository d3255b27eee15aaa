"""Grid search: every combination of values once, in order, each with a unique trial name."""

from __future__ import annotations

import re
from collections import deque
from hashlib import blake2b
from itertools import product

from reformer_dist.errors import ConfigError
from reformer_dist.sweep.space import Interval, SearchSpace
from reformer_dist.sweep.trial_metrics import MetricsRow
from reformer_dist.sweep.trials import ENDED, Trial

MAX_NAME_LENGTH = 120


def combinations(space: SearchSpace) -> list[dict[str, str]]:
    """Distinct combinations; the last key varies fastest. Raises ConfigError for an interval without a step."""
    columns = []
    for key, dimension in space.items():
        if isinstance(dimension, Interval):
            if dimension.step is None:
                interval = f"interval({dimension.low:g},{dimension.high:g})"
                problem = "a grid needs a finite set of values"
                fix = "give choices such as 1,2,4 or range(1,9), or search with sweep=optuna"
                raise ConfigError(f"{key}={interval}: {problem}; {fix}")
            columns.append(dimension.values())
        else:
            columns.append(dimension.values)
    rows = [dict(zip(space, values, strict=True)) for values in product(*columns)]
    return list({tuple(row.items()): row for row in rows}.values())


def trial_name(changed: dict[str, str]) -> str:
    """Folder name of a trial: its overrides, in characters that need no quoting in a shell or in Hydra's grammar.

    `model.n_hashes-4+optim.lr-0.001`. If characters had to be replaced or the name is too long, it ends with a
    hash of the overrides.
    """
    overrides = "+".join(f"{key.lstrip('+')}={value}" for key, value in changed.items())
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", overrides.replace("=", "-")).strip("-")
    is_lossy = re.search(r"[^A-Za-z0-9_.+=-]", overrides) is not None
    if not is_lossy and len(name) <= MAX_NAME_LENGTH:
        return name
    return f"{name[:MAX_NAME_LENGTH]}-{blake2b(overrides.encode(), digest_size=4).hexdigest()}"


class GridSearch:
    """Runs a list of trials."""

    def __init__(self, trials: list[Trial]) -> None:
        """trials: all trials of this driver; those that have ended are skipped."""
        self._waiting = deque(trial for trial in trials if trial.state not in ENDED)
        self._n_ended = len(trials) - len(self._waiting)

    def describe(self) -> str:
        return f"{len(self._waiting) + self._n_ended} trials, {len(self._waiting)} to run"

    def next_trial(self) -> Trial | None:
        return self._waiting.popleft() if self._waiting else None

    def should_prune(self, trial: Trial, rows: list[MetricsRow]) -> bool:
        return False

    def trial_ended(self, trial: Trial) -> None:
        pass
