"""Results of a sweep: a table as text, CSV and JSON, plots, and TensorBoard hyperparameters."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from pathlib import Path
from statistics import mean, stdev

from reformer_dist.errors import UserError
from reformer_dist.fs.atomic import write_atomic
from reformer_dist.process.log import logger
from reformer_dist.process.text_table import format_table
from reformer_dist.sweep.trials import Trial, TrialStatus

HPARAMS_FOLDER = "hparams"
SEED = "trainer.seed"


def write_report(folder: Path, trials: list[Trial], objective: str, *, maximize: bool = False) -> None:
    """Writes results.csv, results.json, plots and hparams/ to the sweep's folder, and logs the table.

    objective: the metric that ranks the trials. maximize: whether higher values of it are better.
    """
    ordered = best_first(trials, objective, maximize=maximize)
    rows = table(ordered, objective)
    csv_text = io.StringIO()
    writer = csv.DictWriter(csv_text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(folder / "results.csv", csv_text.getvalue())
    write_atomic(folder / "results.json", json.dumps(rows, indent=1) + "\n")
    _write_hparams(folder, [trial for trial in ordered if trial.result])
    logger.info("\n" + as_text(rows))
    if averages := over_seeds(ordered, objective):
        logger.info("\n" + format_table(averages))
    try:
        from reformer_dist.sweep.plots import write_plots

        plots = write_plots(folder, ordered, objective, maximize=maximize)
    except UserError as error:
        logger.warning(str(error))
        plots = []
    names = ", ".join(["results.csv", "results.json", *plots])
    logger.info(f"\nwritten to {folder}: {names}; see the HPARAMS tab of tensorboard --logdir {folder}")


def best_first(trials: list[Trial], objective: str, *, maximize: bool = False) -> list[Trial]:
    """Finished trials by objective, those without a value last, then the others by name."""
    sign = -1 if maximize else 1

    def key(trial: Trial) -> tuple[bool, float, str]:
        value = sign * trial.result[objective] if objective in trial.result else math.inf
        return trial.state is not TrialStatus.finished, value, trial.name

    return sorted(trials, key=key)


def over_seeds(trials: list[Trial], objective: str) -> list[dict[str, str | float | None]]:
    """Mean and standard deviation of the objective over finished trials that differ in trainer.seed only.

    Empty if no trials do.
    """
    groups: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for trial in trials:
        if trial.state is TrialStatus.finished and objective in trial.result and SEED in trial.changed:
            others = tuple((key, value) for key, value in trial.changed.items() if key != SEED)
            groups.setdefault(others, []).append(trial.result[objective])
    return [
        {**dict(others), "seeds": len(values), f"mean {objective}": mean(values), "deviation": stdev(values)}
        for others, values in groups.items()
        if len(values) > 1
    ]


def table(trials: list[Trial], objective: str) -> list[dict[str, str | float | None]]:
    """One row per trial: name, state, overrides, results, and the reason of a failure."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.changed))
    tags = list(dict.fromkeys([objective, *(tag for trial in trials for tag in trial.result)]))
    return [
        {
            "trial": trial.name,
            "state": trial.state.value,
            **{key: trial.changed.get(key) for key in keys},
            **{tag: trial.result.get(tag) for tag in tags},
            "reason": trial.reason,
        }
        for trial in trials
    ]


def as_text(rows: list[dict[str, str | float | None]]) -> str:
    """Aligned columns, without the name of the trial, which repeats its overrides."""
    return format_table(rows, [name for name in rows[0] if name != "trial"]) if rows else "no trials"


def _write_hparams(folder: Path, trials: list[Trial]) -> None:
    """Rewrites hparams/, which is separate from the event files of the trials."""
    from reformer_dist.training.tensorboard import write_hparams

    target = folder / HPARAMS_FOLDER
    shutil.rmtree(target, ignore_errors=True)
    for trial in trials:
        values = {key.lstrip("+"): parse_value(value) for key, value in trial.changed.items()}
        write_hparams(target / trial.name, values, trial.result)


def parse_value(value: str) -> float | str | bool:
    """Value of an override: 4.0 for "4", "rotary" for "rotary"."""
    if value in ("true", "false"):
        return value == "true"
    try:
        return float(value)
    except ValueError:
        return value
