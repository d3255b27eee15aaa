"""Says which rank is slow, and at what, when a part of a step takes longer than trainer.step_timeout."""

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

LOOKS = 4  # in each time limit


class Watchdog:
    """A thread that looks at what the main thread does; it ends nothing (parallel.timeout does that)."""

    def __init__(self, runtime: Runtime, limit: float) -> None:
        """limit: in seconds; 0 means never."""
        self._who, self._limit = f"rank {runtime.rank} of {runtime.world_size}", limit
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
    def phase(self, words: str) -> Iterator[None]:
        """words: what the main thread is doing, such as "waiting for data"."""
        self._phase = (words, time.monotonic())
        try:
            yield
        finally:
            self._phase = None

    def _watch(self) -> None:
        told: tuple[str, float] | None = None
        while not self._end.wait(self._limit / LOOKS):
            phase = self._phase
            if phase is None or phase == told or time.monotonic() - phase[1] < self._limit:
                continue
            told = phase
            logger.error(
                f"{self._who} is {phase[0]} for more than {self._limit:g} s (trainer.step_timeout), "
                f"at {self._place()}"
            )

    def _place(self) -> str:
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return "its end"
        ours = [each for each in traceback.extract_stack(frame) if "reformer_dist" in each.filename]
        line = (ours or traceback.extract_stack(frame))[-1]
        return f"{Path(line.filename).name}:{line.lineno} in {line.name}"
