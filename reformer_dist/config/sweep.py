"""How `--multirun` makes trials of one command, and how many of them run side by side. A run itself ignores it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from reformer_dist.config.checks import at_least, check_types, require
from reformer_dist.errors import ConfigError


class SweepKind(Enum):
    grid = "grid"
    optuna = "optuna"


@dataclass(kw_only=True)
class SweepConfig:
    """A sweep: what it tries is given by choices and ranges among the overrides, or by params."""

    kind: SweepKind = SweepKind.grid
    """grid: every combination; optuna: a search, which learns from the trials that are done."""
    params: dict[str, str] = field(default_factory=dict)
    """What to try of each key, as in an override: "1,2,4", "range(2,9)", "tag(log,interval(1e-4,1e-2))"."""
    parallel: int | None = None
    """Trials side by side; null: as many as the GPUs, or the cores where there is none, hold."""
    shard: str = "0/1"
    """i/n: this driver takes the i-th of n shares of the trials, counted from 0 (tasks of a SLURM array)."""
    objective: str = "eval/loss"
    """Metric by which trials are compared, the last value of each; lower is better."""
    retry_failed: bool = False
    """Trials that failed in an earlier sweep of this folder run again."""
    coverage_rows: int = 0
    """Held-out rows on which the attention coverage of each trained trial is measured; 0 means none."""

    n_trials: int = 20
    """optuna: trials of the study in all, those of earlier drivers included."""
    seed: int = 0
    """optuna: of its sampler."""
    prune_after: int | None = 0
    """optuna: steps from which on a trial worse than the median of the others is stopped; null stops none."""

    def __post_init__(self) -> None:
        check_types(self, "sweep")
        at_least(1, sweep__parallel=self.parallel, sweep__n_trials=self.n_trials)
        at_least(0, sweep__coverage_rows=self.coverage_rows, sweep__seed=self.seed)
        at_least(0, sweep__prune_after=self.prune_after)
        require(self.objective != "", "sweep.objective", "''", "must name a metric, such as eval/loss")
        self.share()

    def share(self) -> tuple[int, int]:
        """(i, n) of sweep.shard."""
        first, _, second = self.shard.partition("/")
        if first.isdecimal() and second.isdecimal() and int(first) < int(second):
            return int(first), int(second)
        right = "must be i/n, the number of the share from 0 and the number of shares, such as 0/4"
        raise ConfigError(f"sweep.shard={self.shard}: {right}")
