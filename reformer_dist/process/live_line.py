"""The live line: what a command is doing and how far it is, on the last line of a terminal, below the log.

Shown by `tqdm` where standard output is a terminal whose width is known. Elsewhere nothing is shown, and progress
is logged as lines.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, TypeVar

from reformer_dist.distributed.environment import env_rank
from reformer_dist.process import stdio

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
SEPARATOR = " | "
REDRAW_SECONDS = 0.1


class LiveLine:
    """One line of a terminal. The log shares its stream: `hidden` removes the line while others write."""

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None
        self._phases: list[str] = []
        self._figures = ""
        self._count = ""

    @property
    def is_shown(self) -> bool:
        return self._bar is not None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the line during the block, on rank 0 and if standard output is a terminal."""
        if env_rank() == 0 and _has_width(sys.stdout):
            from tqdm import tqdm

            # no monitoring thread: it would write between two lines of the log
            bar = type("_Bar", (tqdm,), {"monitor_interval": 0})
            self._bar = bar(
                file=_Terminal(sys.stdout), dynamic_ncols=True, leave=False, miniters=1, bar_format=" "
            )
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.leave = bool(self._bar.total)  # the last figures stay
                self._bar.close()
            self._bar, self._phases, self._figures = None, [], ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """name: of what is done during the block, such as "evaluating"; "" for what a command mostly does."""
        if not name:
            yield
            return
        self._phases.append(name)
        self._refresh()
        try:
            yield
        finally:
            if self._phases:
                self._phases.pop()
            self._refresh()

    def counted(self, items: Iterable[T], unit: str) -> Iterator[T]:
        """The items, whose number so far is shown beside the phase: "evaluating: 5 batches"."""
        drawn = 0.0
        for number, item in enumerate(items, 1):
            yield item
            if self.is_shown and time.monotonic() - drawn > REDRAW_SECONDS:
                drawn, self._count = time.monotonic(), f"{number:,} {unit}"
                self._refresh()
        self._count = ""

    def progress(self, done: int, total: int) -> None:
        """How many of how many steps, rows or others are done."""
        if self._bar is not None:
            self._bar.total = total
            self._refresh(done)

    def figures(self, parts: Sequence[str]) -> None:
        """Figures beside the bar, the most important first: a narrow terminal shows no others."""
        self._figures = SEPARATOR.join(parts)
        self._refresh()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Removes the line during the block, which writes to the terminal."""
        if self._bar is not None:
            self._bar.clear()
        yield
        self._refresh()

    def _refresh(self, done: int | None = None) -> None:
        """Draws the line: at once, or after a step if the last drawing is a tenth of a second old."""
        bar = self._bar
        if bar is None:
            return
        phase = f"{': '.join(filter(None, [self._phases[-1], self._count]))} " if self._phases else ""
        counts = "{n_fmt}/{total_fmt} {percentage:3.0f}% |{bar:10}| " if bar.total else ""
        bar.bar_format = f"{phase}{counts}{self._figures}".rstrip() or " "
        if done is None:
            bar.refresh()
        else:
            bar.update(done - bar.n)


def _has_width(stream: TextIO) -> bool:
    """Whether it is a terminal on which a line can be fitted: some, as of containers, have no columns."""
    return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0


class _Terminal:
    """A terminal that may be closed while the command runs on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.encoding = stream, stream.encoding

    def write(self, text: str) -> None:
        stdio.write(self._stream, text)

    def flush(self) -> None:
        stdio.write(self._stream, "")

    def fileno(self) -> int:
        """For the width of the terminal."""
        return self._stream.fileno()


live = LiveLine()
"""The line of this process."""
