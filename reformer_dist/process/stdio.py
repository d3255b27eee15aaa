"""Standard output and error that nobody reads any more: `| head` ended, Ctrl-C ended `| tee`, a terminal closed.

Work goes on, and what would be said goes nowhere. Imports nothing slow.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from reformer_dist.process.signals import INTERRUPTED

# what a shell says of a program that SIGPIPE ended. Only a command that nobody read to its end has it: one that
# was done all the same, or trains on without a reader, ends with the status of its own
UNREAD = 141


@contextmanager
def quietly() -> Iterator[None]:
    """Within, a command that nobody reads to its end, or that Ctrl-C interrupts, ends without a trace."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        if not any(map(is_unread, (sys.stdout, sys.stderr))):
            raise
        sys.exit(UNREAD)
    finally:
        flush()


def is_unread(stream: TextIO) -> bool:
    """Whether the other end of its pipe or terminal is closed; False of a stream that has none."""
    poll = select.poll()
    try:
        poll.register(stream, 0)  # no event asked for: what is told all the same is that the other end is gone
    except (OSError, ValueError):  # it is in memory, or closed on this side
        return False
    return bool(poll.poll(0))


def silence(stream: TextIO) -> None:
    """What waits in it, and all that is written to it from now on, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def say(stream: TextIO, words: str) -> None:
    """Writes, and does not mind if nobody reads."""
    try:
        stream.write(words)
        stream.flush()
    except OSError:
        if not is_unread(stream):
            raise
        silence(stream)


def flush() -> None:
    """Lets the interpreter end with the command's own status: a flush of its own that fails makes it 120."""
    for stream in (sys.stdout, sys.stderr):
        say(stream, "")
