"""The learning rate and the stages of a run over its steps, as text and as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reformer_dist.config import OptimConfig
from reformer_dist.config.stages import Stage
from reformer_dist.engine.schedule import learning_rate
from reformer_dist.errors import UserError

WIDTH, HEIGHT = 72, 6  # characters
EIGHTHS = " ▁▂▃▄▅▆▇█"
LABEL = 10  # characters before a line of the chart
PLOT_STEPS = 2000  # points of a curve


def draw_schedule(optim: OptimConfig, max_steps: int, stages: Sequence[Stage]) -> list[str]:
    """A bar chart of the learning rate, with a mark where a stage begins."""
    width = min(WIDTH, max_steps)
    steps = [column * max_steps // width for column in range(width)]
    rates = [learning_rate(optim, step, max_steps) for step in steps]
    peak = max(rates)
    heights = [round(8 * HEIGHT * rate / peak) if peak else 0 for rate in rates]
    lines = [f"learning rate {optim.schedule.name}, {max_steps:,} steps"]
    for row in reversed(range(HEIGHT)):
        label = f"{peak:.2g}" if row == HEIGHT - 1 else "0" if row == 0 else ""
        bars = "".join(EIGHTHS[min(8, max(0, height - 8 * row))] for height in heights)
        lines.append(f"{label:>{LABEL - 2}} |{bars.rstrip()}")
    if len(stages) > 1:
        marks = [" "] * width
        for stage in stages:
            if stage.first_step < max_steps:
                marks[stage.first_step * width // max_steps] = str((stage.index + 1) % 10)
        lines.append(f"{'stage':>{LABEL - 2}} |{''.join(marks).rstrip()}")
    return lines


def plot_schedule(optim: OptimConfig, max_steps: int, stages: Sequence[Stage], path: Path) -> None:
    """Writes the curve of the learning rate, and lines where stages begin. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which selects a display backend
    except ImportError as error:
        fix = "pip install 'reformer_dist[sweep]'"
        raise UserError(f"--plot={path}: matplotlib is not installed; {fix}") from error
    n_points = min(max_steps, PLOT_STEPS)
    steps = [point * max_steps // n_points for point in range(n_points)]
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([step + 1 for step in steps], [learning_rate(optim, step, max_steps) for step in steps])
    for stage in [stage for stage in stages[1:] if stage.first_step < max_steps]:
        axes.axvline(stage.first_step, color="gray", linestyle=":")
        data = stage.config.data
        label = f" {data.batch_size} x {data.seq_len:,}"
        axes.text(stage.first_step, 0, label, rotation=90, va="bottom", ha="left", fontsize="small")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot={path}: can't be written: {error}") from error
