"""SpikeMonitor: steps whose loss or gradient norm is far above those of the steps before.

They are counted, and written down with the rows that they read. With trainer.skip_spikes they change nothing, as
steps with a non-finite gradient.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from reformer_dist.config import RunConfig
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.process.log import logger
from reformer_dist.training.checkpoint_manager import TrainState
from reformer_dist.training.metrics_log import truncate_rows

SPIKES_FILE = "spikes.jsonl"
LEAST_SPREAD = 0.01  # of the deviation, as a fraction of the mean: equal values have none
NAMES = ("loss", "grad_norm")


@dataclass(frozen=True)
class RunningMean:
    """Mean and variance of the values so far, of which the older ones count less."""

    mean: float = 0.0
    variance: float = 0.0
    n_values: float = 0.0

    def limit(self, sigma: float) -> float:
        """The value that is `sigma` deviations above the mean."""
        return self.mean + sigma * max(math.sqrt(self.variance), LEAST_SPREAD * abs(self.mean))

    def with_value(self, value: float, window: int) -> RunningMean:
        """window: values after which the weight of a value stays 1 / window."""
        n_values = min(self.n_values + 1, window)
        weight, difference = 1 / n_values, value - self.mean
        variance = (1 - weight) * (self.variance + weight * difference**2)
        return RunningMean(self.mean + weight * difference, variance, n_values)


class SpikeMonitor:
    """Judges each step of a run. Every rank makes the same calls in the same order, and judges alike."""

    def __init__(self, config: RunConfig, runtime: Runtime, state: TrainState) -> None:
        self._trainer, self._runtime, self._state = config.trainer, runtime, state
        self._path = Path(config.output_dir) / SPIKES_FILE
        self._running = {name: RunningMean(*state.running.get(name, ())) for name in NAMES}
        self._step: tuple[Tensor, float] | None = None
        self._values: dict[str, float] = {}
        if runtime.is_main and self.is_active:
            truncate_rows(self._path, state.step)

    @property
    def is_active(self) -> bool:
        return self._trainer.spike_sigma > 0

    def begin_stage(self) -> None:
        """Forgets the values so far, which were of steps with other rows."""
        self._running = {name: RunningMean() for name in NAMES}
        self._state.running.clear()

    def begin_step(self, loss_sum: Tensor, n_labels: float) -> None:
        """loss_sum: of this rank, in nats. n_labels: of all ranks."""
        self._step, self._values = (loss_sum, n_labels), {}

    def accepts(self, grad_norm: float) -> bool:
        """Whether the step is no spike. grad_norm: finite, and the same on every rank."""
        self._measure(grad_norm)
        # all ranks have the same numbers, but one that decided otherwise would be lost
        return not any(self._runtime.sum([float(bool(self._limits_passed()))]))

    def end_step(self, *, was_skipped: bool, grad_norm: float, samples: Mapping[int, Sequence[str]]) -> None:
        """Counts the step if it is a spike. samples: ids of what each row of this rank has read."""
        if not self.is_active:
            return
        if not self._values and not was_skipped:
            self._measure(grad_norm)
        if not all(map(math.isfinite, self._values.values())):
            return
        passed = self._limits_passed()
        if passed:
            self._state.spikes += 1
            self._record(passed, samples, was_skipped=was_skipped)
        for name, value in self._values.items():
            # a spike moves the limit, but not by its height: a run whose level has changed goes on
            value = min(value, passed.get(name, value))
            self._running[name] = self._running[name].with_value(value, self._trainer.spike_window)
            running = self._running[name]
            self._state.running[name] = [running.mean, running.variance, running.n_values]

    def _measure(self, grad_norm: float) -> None:
        assert self._step is not None
        loss_sum, n_labels = self._step
        self._values = {"loss": self._runtime.sum([float(loss_sum)])[0] / n_labels, "grad_norm": grad_norm}

    def _limits_passed(self) -> dict[str, float]:
        """The limits that the values of the step are above."""
        sigma, window = self._trainer.spike_sigma, self._trainer.spike_window
        limits = {name: mean.limit(sigma) for name, mean in self._running.items() if mean.n_values >= window}
        return {name: limit for name, limit in limits.items() if self._values.get(name, -math.inf) > limit}

    def _record(
        self, passed: dict[str, float], samples: Mapping[int, Sequence[str]], *, was_skipped: bool
    ) -> None:
        by_rank = self._runtime.gather(dict(samples))
        rows = {row: list(ids) for part in by_rank for row, ids in part.items()}
        step = self._state.step
        found = " and ".join(
            f"{name.replace('_', ' ')} {self._values[name]:.3f} (limit {limit:.3f})"
            for name, limit in passed.items()
        )
        what = "skipped" if was_skipped else "trained on"
        logger.warning(f"step {step} is a spike: {found}; it is {what}, and its rows are in {self._path}")
        line: dict[str, Any] = {"step": step, **self._values, "limits": passed, "was_skipped": was_skipped}
        line["rows"] = {str(row): rows[row] for row in sorted(rows)}
        if self._runtime.is_main:
            try:
                with self._path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                logger.warning(f"{self._path}: can't be written ({error.strerror})")
