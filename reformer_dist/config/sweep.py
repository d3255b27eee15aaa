"""Sweeps: the trials of `--multirun`, and how many run in parallel. A single run ignores it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from reformer_dist.config.checks import LARGEST_INT64, ConfigGroup, bounded, require
from reformer_dist.errors import ConfigError


class SweepKind(Enum):
    grid = "grid"
    optuna = "optuna"


@dataclass(kw_only=True)
class SweepConfig(ConfigGroup, prefix="sweep."):
    """A sweep. Its search space is given by choices and ranges among the overrides, or by params."""

    kind: SweepKind = SweepKind.grid
    """grid: every combination; optuna: a search that learns from finished trials."""
    params: dict[str, str] = field(default_factory=dict)
    """Search space by key, in override syntax: "1,2,4", "range(2,9)", "tag(log,interval(1e-4,1e-2))"."""
    parallel: int | None = bounded(None, least=1, most=1024)
    """Trials that run in parallel; null: as many as fit on the GPUs, or on the cores if there is none."""
    shard: str = "0/1"
    """i/n: this driver runs the i-th of n parts of the trials, counted from 0 (tasks of a SLURM array)."""
    objective: str = "eval/loss"
    """Metric that ranks the trials, by its last value; lower is better."""
    retry_failed: bool = False
    """Rerun trials that failed in an earlier sweep of this directory."""
    coverage_rows: int = bounded(0, least=0)
    """Held-out rows on which the attention coverage of each trained trial is measured; 0 means none."""

    n_trials: int = bounded(20, least=1)
    """optuna: trials of the study in total, including those of earlier drivers."""
    seed: int = bounded(0, least=0, most=LARGEST_INT64)
    """optuna: seed of its sampler."""
    prune_after: int | None = bounded(0, least=0)
    """optuna: from this step on, trials worse than the median of the others are pruned; null: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.objective != "", "sweep.objective", "''", "must name a metric, such as eval/loss")
        self.parse_shard()

    def parse_shard(self) -> tuple[int, int]:
        """(i, n) of sweep.shard."""
        index, _, count = self.shard.partition("/")
        if index.isdecimal() and count.isdecimal() and int(index) < int(count):
            return int(index), int(count)
        requirement = "must be i/n, the index of the shard from 0 and the number of shards, such as 0/4"
        raise ConfigError(f"sweep.shard={self.shard}: {requirement}")
