"""Sweeps: the trials of `--multirun`, and how many run in parallel. A single run ignores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from reformer_dist.config.checks import LARGEST_INT64, ConfigGroup, bounded, one_of, require
from reformer_dist.config.keywords import nearest
from reformer_dist.errors import ConfigError


class SweepKind(Enum):
    grid = "grid"
    optuna = "optuna"


class SweepDirection(Enum):
    auto = "auto"
    """That of the metric: accuracy is maximized, loss is minimized."""
    minimize = "minimize"
    maximize = "maximize"


# metrics of a trial that can rank it, and whether higher values are better
METRICS: Mapping[str, bool] = {
    "eval/loss": False,
    "eval/bits_per_byte": False,
    "eval/accuracy": True,
    "train/loss": False,
    "train/bits_per_byte": False,
    "train/grad_norm": False,
    "perf/tokens_per_s": True,
    "perf/peak_memory_gib": False,
    "task/bleu": True,
    "task/rouge_1": True,
    "task/rouge_2": True,
    "task/rouge_l": True,
    "task/exact_match": True,
    "task/f1": True,
    "coverage/mass": True,
    "coverage/pairs": False,
    "lsh/coverage": True,
    "lsh/coverage_by_chance": False,
    "lsh/largest_bucket_over_mean": False,
    "lsh/full_windows": False,
    "lsh/agreement_of_rounds": True,
    "reversible/drift": False,
}


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
    """Metric that ranks the trials, by its last value."""
    direction: SweepDirection = SweepDirection.auto
    """Values of the objective that are better: minimize or maximize it; auto, as its metric says."""
    retry_failed: bool = False
    """Rerun trials that failed in an earlier sweep of this directory."""
    coverage_rows: int = bounded(0, least=0)
    """Held-out rows on which the attention coverage of each trained trial is measured; 0 means none."""

    task_rows: int = bounded(0, least=0)
    """Held-out rows on which BLEU, ROUGE, exact match or F1 of each trained trial is measured; 0 means none."""

    n_trials: int = bounded(20, least=1)
    """optuna: trials of the study in total, including those of earlier drivers."""
    seed: int = bounded(0, least=0, most=LARGEST_INT64)
    """optuna: seed of its sampler."""
    prune_after: int | None = bounded(0, least=0)
    """optuna: from this step on, trials worse than the median of the others are pruned; null: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        closest = nearest(self.objective, METRICS)
        hint = f"; did you mean {closest}?" if closest else ""
        requirement = f"must be a metric of a trial: {one_of(list(METRICS))}{hint}"
        require(self.objective in METRICS, "sweep.objective", self.objective or "''", requirement)
        for rows in ("coverage_rows", "task_rows"):
            is_measured = getattr(self, rows) > 0 or not self.objective.startswith(rows.replace("_rows", "/"))
            require(is_measured, "sweep.objective", self.objective, f"needs sweep.{rows} above 0")
        self.parse_shard()

    @property
    def maximizes(self) -> bool:
        """Whether higher values of the objective are better."""
        if self.direction is SweepDirection.auto:
            return METRICS[self.objective]
        return self.direction is SweepDirection.maximize

    def parse_shard(self) -> tuple[int, int]:
        """(i, n) of sweep.shard."""
        index, _, count = self.shard.partition("/")
        if index.isdecimal() and count.isdecimal() and int(index) < int(count):
            return int(index), int(count)
        requirement = "must be i/n, the index of the shard from 0 and the number of shards, such as 0/4"
        raise ConfigError(f"sweep.shard={self.shard}: {requirement}")
