"""Progress of `reformer-shards`: how much of the input was read, MB/s of text, and the time left."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from reformer_dist.data import read_counter
from reformer_dist.process.live_line import live
from reformer_dist.process.log import logger

LINE_SECONDS = 60.0  # between lines of a log, where there is no live line
MB = 1e6


def input_bytes(paths: Iterable[Path]) -> int:
    """Bytes of files, and of all files below folders, compressed as they are."""
    files = (file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
    return sum(file.stat().st_size for file in files if file.is_file())


class Progress:
    """A live line on a terminal; else a line of the log from time to time."""

    def __init__(self, label: str, total_bytes: int) -> None:
        self._label, self._total, self.text_bytes = label, max(1, total_bytes), 0
        self._first, self._start = read_counter.n_bytes, time.monotonic()
        self._next_line = self._start + LINE_SECONDS

    @property
    def rate(self) -> float:
        """MB of text per second."""
        return self.text_bytes / MB / max(1e-9, time.monotonic() - self._start)

    def add(self, n_bytes: int) -> None:
        """Counts bytes of text."""
        self.text_bytes += n_bytes
        now = time.monotonic()
        n_read = min(self._total, read_counter.n_bytes - self._first)
        seconds = (now - self._start) * (self._total / max(1, n_read) - 1)
        figures = [f"{self.rate:.1f} MB/s of text", f"{_clock(seconds)} left"]
        live.figures(figures)
        live.progress(round(n_read / MB), max(1, round(self._total / MB)))
        if not live.is_shown and now > self._next_line:
            logger.info(f"{self._label}: {n_read / self._total:.0%}, {', '.join(figures)}")
            self._next_line = now + LINE_SECONDS

    def counted(self, texts: Iterable[bytes]) -> Iterator[bytes]:
        """The texts, whose bytes are counted."""
        for text in texts:
            self.add(len(text))
            yield text


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


@contextmanager
def progress(label: str, total_bytes: int) -> Iterator[Progress]:
    """Shows progress during the block."""
    with live.shown(), live.phase(label):
        yield Progress(label, total_bytes)
