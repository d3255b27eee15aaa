"""Runs side by side: the keys in which they differ, their metrics, and a plot of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reformer_dist.errors import ConfigError, UserError
from reformer_dist.process.text_table import Cell
from reformer_dist.run.config_changes import flatten
from reformer_dist.runs.summary import HELDOUT, TITLES, RunSummary
from reformer_dist.sweep.trial_metrics import SPEED, TIME, TRAIN_LOSS, series

NOT_OF_THE_MODEL = ("output_dir", "launcher", "sweep", "tracker")


def short_names(runs: Sequence[RunSummary]) -> list[str]:
    """Paths below the directory that the runs have in common."""
    folders = [run.folder.absolute() for run in runs]
    common = next(parent for parent in folders[0].parents if all(parent in each.parents for each in folders))
    return [str(folder.relative_to(common)) for folder in folders]


def differing_keys(runs: Sequence[RunSummary]) -> list[dict[str, Cell]]:
    """A row for each key with different values: the key, and its value in each run by name."""
    names = short_names(runs)
    configs = [dict(flatten(run.config)) for run in runs]
    keys = sorted(set().union(*configs))
    return [
        {"key": key, **{name: _text(config.get(key)) for name, config in zip(names, configs, strict=True)}}
        for key in keys
        if key.partition(".")[0] not in NOT_OF_THE_MODEL
        and len({_text(config.get(key)) for config in configs}) > 1
    ]


def measured(runs: Sequence[RunSummary], metric: str | None = None) -> list[dict[str, Cell]]:
    """A row for each metric at the end of the runs, and at the last step that all of them have reached."""
    names, common = short_names(runs), min(run.step for run in runs)
    tags = [metric] if metric is not None else [TRAIN_LOSS, *HELDOUT]
    if metric is not None:
        require_metric(runs, metric)
    ends: list[dict[str, Cell]] = [{"metric": "step", **_row(names, [run.step for run in runs])}]
    for tag in [*tags, SPEED, TIME]:
        values = [run.value_at(tag, run.step) for run in runs]
        if any(value is not None for value in values):
            ends.append({"metric": TITLES.get(tag, tag), **_row(names, values)})
    if any(run.step != common for run in runs):
        for tag in tags:
            values = [run.value_at(tag, common) for run in runs]
            if any(value is not None for value in values):
                ends.append({"metric": f"{TITLES.get(tag, tag)} at step {common:,}", **_row(names, values)})
    return ends


def require_metric(runs: Sequence[RunSummary], metric: str) -> None:
    """Raises ConfigError if no run has logged a metric."""
    logged = sorted({tag for run in runs for row in run.metrics for tag in row} - {"step"})
    if metric not in logged:
        raise ConfigError(f"--metric {metric}: no run has logged it; they have {', '.join(logged)}")


def write_plot(runs: Sequence[RunSummary], metric: str, path: Path) -> None:
    """A metric over steps and over hours of training, with a line for each run. Raises UserError."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot: matplotlib is not installed; pip install 'reformer_dist[sweep]'") from error
    require_metric(runs, metric)
    figure = Figure(figsize=(10, 4), layout="constrained")
    steps, hours = figure.subplots(1, 2, sharey=True)
    for run, name in zip(runs, short_names(runs), strict=True):
        seconds = dict(series(run.metrics, TIME))
        points = series(run.metrics, metric)
        if points:
            values = [value for _, value in points]
            steps.plot([step for step, _ in points], values, label=name)
            hours.plot([seconds[step] / 3600 for step, _ in points], values)
    steps.set(xlabel="step", ylabel=metric)
    hours.set(xlabel="hours of training")
    for axes in (steps, hours):
        axes.grid(alpha=0.3)
    steps.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: can't be written ({error})") from error


def _row(names: Sequence[str], values: Sequence[float | None]) -> dict[str, Cell]:
    return dict(zip(names, values, strict=True))


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
