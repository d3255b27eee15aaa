"""A pseudo-terminal as standard output of this process."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Screen:
    """What was written to the terminal."""

    def __init__(self) -> None:
        self.text = ""

    @property
    def frames(self) -> list[str]:
        """Each state of a line, without blanks at its end: drawings end in a carriage return or a line feed."""
        return [frame.rstrip() for frame in re.split(r"[\r\n]+", ESCAPES.sub("", self.text)) if frame.strip()]


@contextmanager
def terminal(columns: int) -> Iterator[Screen]:
    """Within the block, sys.stdout is a terminal of this width; afterwards, the screen has all of its output."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    screen, previous = Screen(), sys.stdout

    def read() -> None:
        received = b""
        while chunk := _read(master):
            received += chunk
        screen.text = received.decode()

    reader = threading.Thread(target=read)
    reader.start()
    sys.stdout = Path(f"/proc/self/fd/{slave}").open("w", encoding="utf-8")  # noqa: SIM115
    try:
        yield screen
    finally:
        sys.stdout.close()
        sys.stdout = previous
        os.close(slave)
        reader.join()
        os.close(master)


def _read(master: int) -> bytes:
    try:
        return os.read(master, 4096)
    except OSError:  # the other end is closed
        return b""
