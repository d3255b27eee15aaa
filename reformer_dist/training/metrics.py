"""Training metrics: loss over a window of steps, throughput, memory, and the progress line."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch


def bits_per_byte(nats: float, n_bytes: float) -> float:
    return nats / math.log(2) / n_bytes if n_bytes else math.nan


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the GPU, or the peak resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def duration(seconds: float) -> str:
    """Formats seconds as 1h02m, 3m20s or 45s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


@dataclass(frozen=True)
class WindowMetrics:
    loss: float
    """Mean loss in nats per token over the steps that were not skipped; nan if there are none."""
    tokens_per_s: float
    seconds_per_step: float
    data_wait: float = 0.0
    """Fraction of the time in which the ranks waited for the rows of a step."""
    flops_per_s: float = 0.0
    """Of all ranks; 0 where the cost of a step is unknown."""


@dataclass(frozen=True)
class StepCost:
    """What a step computes, and what the devices could compute: for the model FLOPs utilization (MFU)."""

    flops: float
    """Of forward and backward over all ranks, without what is computed again."""
    peak: float
    """FLOPs per second of all ranks' devices."""


class MetricsWindow:
    """Metrics of the steps since the last reset. Sums stay on the device, so adding does not synchronize."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._counted_tokens, self._tokens, self._steps, self._flops = 0.0, 0.0, 0, 0.0
        self._start = time.perf_counter()
        self._paused, self._waited = 0.0, 0.0

    def add(self, loss_sum: torch.Tensor, tokens: float, *, was_skipped: bool, flops: float = 0.0) -> None:
        """Adds a step: this rank's summed loss, and the valid tokens and FLOPs of all ranks."""
        self._steps += 1
        self._flops += flops
        self._tokens += tokens
        if not was_skipped:
            self._loss += loss_sum
            self._counted_tokens += tokens

    def exclude_time(self, seconds: float) -> None:
        """Excludes time spent on evaluation, samples or checkpoints from throughput."""
        self._paused += seconds

    def add_data_wait(self, seconds: float) -> None:
        """Counts time spent waiting for data."""
        self._waited += seconds

    @property
    def has_steps(self) -> bool:
        return self._steps > 0

    @property
    def seconds(self) -> float:
        """Time spent on steps since the last reset."""
        return time.perf_counter() - self._start - self._paused

    @property
    def state(self) -> dict[str, float]:
        """This rank's sums, as JSON values, from which a resumed run continues the window."""
        return {
            "loss": self.local_loss,
            "counted": self._counted_tokens,
            "tokens": self._tokens,
            "steps": self._steps,
            "seconds": self.seconds,
            "waited": self._waited,
            "flops": self._flops,
        }

    def load_state(self, state: dict[str, float]) -> None:
        """Restarts the window from a saved `state`."""
        self.reset()
        self._loss += state["loss"]
        self._counted_tokens, self._tokens, self._steps = state["counted"], state["tokens"], int(state["steps"])
        self._paused, self._waited = -state["seconds"], state.get("waited", 0.0)
        self._flops = state.get("flops", 0.0)

    @property
    def local_loss(self) -> float:
        return float(self._loss)

    def result(self, loss_sum: float) -> WindowMetrics:
        """loss_sum: local_loss summed over the ranks."""
        seconds = max(1e-9, self.seconds)
        loss = loss_sum / self._counted_tokens if self._counted_tokens else math.nan
        per_step, waited = seconds / max(1, self._steps), min(1.0, self._waited / seconds)
        return WindowMetrics(loss, self._tokens / seconds, per_step, waited, self._flops / seconds)


def progress_figures(
    metrics: WindowMetrics,
    *,
    steps_left: int,
    bpb: float | None,
    mfu: float | None,
    memory_gib: float,
    grad_norm: float,
    lr: float,
    counts: Mapping[str, int],
) -> list[str]:
    """The figures of a progress line, the most important first. counts: of failures, by name; none is shown."""
    return [
        f"loss {metrics.loss:.3f}",
        *([f"bits per byte {bpb:.3f}"] if bpb is not None else []),
        f"ETA {duration(steps_left * metrics.seconds_per_step)}",
        *(f"{name} {count}" for name, count in counts.items() if count),
        f"{metrics.tokens_per_s:,.0f} {'labels' if bpb is None else 'tokens'}/s",
        *([f"MFU {mfu:.1%}"] if mfu is not None else []),
        f"data wait {metrics.data_wait:.0%}",
        f"{memory_gib:.1f} GiB",
        f"grad norm {grad_norm:.2f}",
        f"lr {lr:.1e}",
    ]
