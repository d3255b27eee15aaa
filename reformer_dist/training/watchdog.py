"""Watchdog: logs the rank and source line when part of a step takes longer than trainer.step_timeout."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reformer_dist.distributed.runtime import Runtime
from reformer_dist.process.log import logger

CHECKS_PER_LIMIT = 4


class Watchdog:
    """A thread that observes the main thread. It only logs: parallel.timeout ends a hanging job."""

    def __init__(self, runtime: Runtime, limit: float) -> None:
        """limit: in seconds; 0 disables the watchdog."""
        self._rank, self._limit = f"rank {runtime.rank} of {runtime.world_size}", limit
        self._main = threading.get_ident()
        self._phase: tuple[str, float] | None = None
        self._end = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        if self._limit > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            self._end.set()

    @contextmanager
    def phase(self, activity: str) -> Iterator[None]:
        """activity: of the main thread, such as "waiting for data"."""
        self._phase = (activity, time.monotonic())
        try:
            yield
        finally:
            self._phase = None

    def _watch(self) -> None:
        reported: tuple[str, float] | None = None
        while not self._end.wait(self._limit / CHECKS_PER_LIMIT):
            phase = self._phase
            if phase is None or phase == reported or time.monotonic() - phase[1] < self._limit:
                continue
            reported = phase
            logger.error(
                f"{self._rank} has been {phase[0]} for more than {self._limit:g} s (trainer.step_timeout), "
                f"at {self._source_line()}"
            )

    def _source_line(self) -> str:
        main_frame = sys._current_frames().get(self._main)
        if main_frame is None:
            return "its end"
        stack = traceback.extract_stack(main_frame)
        line = ([frame for frame in stack if "reformer_dist" in frame.filename] or stack)[-1]
        return f"{Path(line.filename).name}:{line.lineno} in {line.name}"
