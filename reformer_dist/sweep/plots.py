"""Plots of a sweep: loss over time, and Pareto fronts of loss against speed and coverage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reformer_dist.errors import UserError
from reformer_dist.sweep.trial_metrics import SPEED, TIME, TRAIN_LOSS, MetricsRow, read_metrics
from reformer_dist.sweep.trials import Trial

MAX_LEGEND_ENTRIES = 12


def write_plots(folder: Path, trials: list[Trial], objective: str, *, maximize: bool = False) -> list[str]:
    """Writes loss_over_time.png and pareto_*.png; returns their names. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which selects a display backend
    except ImportError as error:
        raise UserError("no plots: matplotlib is not installed; pip install 'reformer_dist[sweep]'") from error
    written = []
    curves = {trial.name: _curve(read_metrics(folder / trial.name), objective) for trial in trials}
    if any(curves.values()):
        written.append(_plot_curves(Figure(figsize=(8, 5)), curves, objective, folder / "loss_over_time.png"))
    for tag, label in ((SPEED, "tokens per second"), ("coverage/mass", "softmax mass covered")):
        points = {
            trial.name: (trial.result[tag], trial.result[objective])
            for trial in trials
            if tag in trial.result and objective in trial.result
        }
        if points:
            target = folder / f"pareto_{tag.rpartition('/')[2]}.png"
            signed = {name: (gain, -value if maximize else value) for name, (gain, value) in points.items()}
            front = pareto_front(signed)
            written.append(_plot_pareto(Figure(figsize=(8, 5)), points, front, (label, objective), target))
    return written


def pareto_front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the non-dominated points (gain, loss); higher gain and lower loss are better."""
    front: list[str] = []
    best = float("inf")
    for name, (_, loss) in sorted(points.items(), key=lambda item: (-item[1][0], item[1][1])):
        if loss < best:
            front.append(name)
            best = loss
    return front


def _curve(rows: list[MetricsRow], objective: str) -> list[tuple[float, float]]:
    """(minutes, loss) of the objective if it was measured at least twice, else of the training loss."""
    for tag in (objective, TRAIN_LOSS):
        points = [(row[TIME] / 60, row[tag]) for row in rows if TIME in row and tag in row]
        if len(points) > 1:
            return points
    return []


def _plot_curves(figure: Any, curves: dict[str, list[tuple[float, float]]], objective: str, target: Path) -> str:
    axes = figure.subplots()
    for number, (name, points) in enumerate(curves.items()):
        label = name if number < MAX_LEGEND_ENTRIES else None  # the best trials come first
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1)
    axes.set(xlabel="minutes", ylabel=f"{objective} (training loss if measured only once)")
    axes.legend(fontsize="x-small")
    return _save(figure, target)


def _plot_pareto(
    figure: Any, points: dict[str, tuple[float, float]], front: list[str], labels: tuple[str, str], target: Path
) -> str:
    axes = figure.subplots()
    axes.scatter(*zip(*points.values(), strict=True), s=16, color="0.6")
    axes.plot(*zip(*(points[name] for name in front), strict=True), marker="o", linewidth=1)
    for name in front:
        axes.annotate(name, points[name], fontsize="x-small", xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel=labels[0], ylabel=labels[1], title="Pareto front")
    return _save(figure, target)


def _save(figure: Any, target: Path) -> str:
    figure.tight_layout()
    temporary = target.with_name(f".{target.name}")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(target)
    return target.name
