"""Standard output and error whose reader is gone: `| head` exited, Ctrl-C ended `| tee`, a terminal was closed.

The process continues, and its output is discarded. Imports nothing slow.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from reformer_dist.process.exit_status import BROKEN_PIPE, INTERRUPTED


@contextmanager
def exit_quietly() -> Iterator[None]:
    """Ends a command without a traceback on Ctrl-C, or if the reader of its output is gone.

    The status is BROKEN_PIPE only if the command was cut short: one that was done, or that trains on without a
    reader, exits with its own status.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        if not any(map(is_disconnected, (sys.stdout, sys.stderr))):
            raise
        sys.exit(BROKEN_PIPE)
    finally:
        flush()


def is_disconnected(stream: TextIO) -> bool:
    """Whether the other end of a pipe or terminal is closed; False for other streams."""
    poll = select.poll()
    try:
        poll.register(stream, 0)  # hang-ups and errors are reported even without an event mask
    except (OSError, ValueError):  # in memory, or closed on this side
        return False
    return bool(poll.poll(0))


def silence(stream: TextIO) -> None:
    """Discards buffered and all future output."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def write(stream: TextIO, text: str) -> None:
    """Writes and flushes; discards the text if the reader is gone."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        if not is_disconnected(stream):
            raise
        silence(stream)


def flush() -> None:
    """Flushes both streams, since the interpreter would exit with 120 if its own flush failed."""
    for stream in (sys.stdout, sys.stderr):
        write(stream, "")
