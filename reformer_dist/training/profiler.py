"""StepProfiler: traces of the steps of trainer.profile by `torch.profiler`, and a table of their time by part."""

from __future__ import annotations

import gzip
import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from reformer_dist.distributed.runtime import Runtime
from reformer_dist.ops.profiling import STEP, part
from reformer_dist.process.log import logger
from reformer_dist.training.trace_table import TimeTable, time_by_part

FOLDER = "profile"


class StepProfiler:
    """Profiles some steps of a run on every rank. The step before them is profiled too, but not recorded."""

    def __init__(self, steps: list[int] | None, output_dir: Path, runtime: Runtime) -> None:
        """steps: the first and the last; None profiles nothing."""
        self._first, self._last = steps or (0, 0)
        self._folder, self._runtime = output_dir / FOLDER, runtime
        self._profile: profile | None = None
        self._begun = 0
        self._measured: list[float] = []

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the work of a step, counted from 1."""
        if not max(1, self._first - 1) <= step <= self._last:
            yield
            return
        if self._profile is None:
            self._start(step)
        start = time.perf_counter()
        with part(STEP):
            yield
        if step >= self._begun:
            self._measured.append(time.perf_counter() - start)
        assert self._profile is not None
        if step == self._last:
            self._finish()
        else:
            self._profile.step()

    def _start(self, step: int) -> None:
        warmup = 1 if step < self._first else 0
        self._begun = step + warmup
        activities = [ProfilerActivity.CPU]
        if self._runtime.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # of its own log, which would be on the terminal
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*warmup.*")
            n_steps = self._last - self._begun + 1
            plan = schedule(wait=0, warmup=warmup, active=n_steps, repeat=1)
            self._profile = profile(activities=activities, schedule=plan)
            self._profile.start()

    def _finish(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        name = f"rank-{self._runtime.rank:05d}.steps-{self._begun}-{self._last}"
        trace = self._folder / f"{name}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(trace))
            table = self._table(trace)
            (self._folder / f"{name}.txt").write_text(f"{table}\n")
        except OSError as error:
            logger.warning(f"trainer.profile: {trace} can't be written ({error.strerror})")
        else:
            logger.info(f"profile of steps {self._begun} to {self._last}: {trace}\n{table}")
        self._profile = None

    def _table(self, trace: Path) -> TimeTable:
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            return time_by_part(json.load(file)["traceEvents"], self._measured)

    def close(self) -> None:
        """Stops a profile whose steps were not all reached, without a trace."""
        if self._profile is not None:
            logger.warning(
                f"trainer.profile=[{self._first},{self._last}]: the run stopped before; no trace is written"
            )
            self._profile.stop()
            self._profile = None
