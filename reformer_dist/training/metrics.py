"""Numbers of the run: loss over a window of steps, speed, memory, and the line that shows them."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass

import torch


def bits_per_byte(nats: float, n_bytes: float) -> float:
    return nats / math.log(2) / n_bytes if n_bytes else math.nan


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def duration(seconds: float) -> str:
    """1h02m, 3m20s or 45s."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


@dataclass(frozen=True)
class WindowResult:
    loss: float
    """Mean loss in nats per token over the steps that counted; nan if none did."""
    tokens_per_s: float
    seconds_per_step: float


class Window:
    """Steps since the last report. Sums stay on the device: a step waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._paused = 0.0
        self.reset()

    def reset(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._counted, self._tokens, self._steps = 0.0, 0.0, 0
        self._start = time.perf_counter()
        self._paused = 0.0

    def add(self, loss_sum: torch.Tensor, tokens: float, *, was_skipped: bool) -> None:
        """One step: this rank's summed loss, and the valid tokens of all ranks."""
        self._steps += 1
        self._tokens += tokens
        if not was_skipped:
            self._loss += loss_sum
            self._counted += tokens

    def pause(self, seconds: float) -> None:
        """Takes time spent on evaluation, samples or checkpoints out of the speed."""
        self._paused += seconds

    @property
    def has_steps(self) -> bool:
        return self._steps > 0

    @property
    def seconds(self) -> float:
        """Spent on steps since the last report."""
        return time.perf_counter() - self._start - self._paused

    @property
    def state(self) -> dict[str, float]:
        """What a resumed run needs to report the window as if it had not been cut: this rank's, as JSON values."""
        return {
            "loss": self.local_loss,
            "counted": self._counted,
            "tokens": self._tokens,
            "steps": self._steps,
            "seconds": self.seconds,
        }

    def go_on(self, state: dict[str, float]) -> None:
        """Begins anew where a saved window was."""
        self.reset()
        self._loss += state["loss"]
        self._counted, self._tokens, self._steps = state["counted"], state["tokens"], int(state["steps"])
        self._paused = -state["seconds"]

    @property
    def local_loss(self) -> float:
        return float(self._loss)

    def result(self, loss_sum: float) -> WindowResult:
        """loss_sum: local_loss summed over the ranks."""
        seconds = max(1e-9, self.seconds)
        loss = loss_sum / self._counted if self._counted else math.nan
        return WindowResult(loss, self._tokens / seconds, seconds / max(1, self._steps))


def progress_line(
    step: int,
    max_steps: int,
    window: WindowResult,
    *,
    bpb: float | None,
    grad_norm: float,
    lr: float,
    skipped: int,
    failed_saves: int,
) -> str:
    parts = [
        f"step {step:>{len(str(max_steps))}}/{max_steps}",
        f"loss {window.loss:.3f}",
        *([] if bpb is None else [f"bits per byte {bpb:.3f}"]),
        f"{window.tokens_per_s:,.0f} {'labels' if bpb is None else 'tokens'}/s",
        f"grad norm {grad_norm:.2f}",
        f"lr {lr:.1e}",
        f"ETA {duration((max_steps - step) * window.seconds_per_step)}",
    ]
    if skipped:
        parts.append(f"skipped {skipped}")
    if failed_saves:
        parts.append(f"failed saves {failed_saves}")
    return " | ".join(parts)
