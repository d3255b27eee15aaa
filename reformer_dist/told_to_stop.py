"""What SIGTERM, SIGINT and SIGHUP mean to a process that has not begun to work: it ends, and may be started again.

Imports nothing slow, since PyTorch and DeepSpeed take seconds to load, and a scheduler may not wait for them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 128 + signal.SIGINT
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def end_when_told() -> None:
    """From now on each of them ends the process with status 75; in the main thread only.

    A signal that is ignored, as SIGINT is in the background of a shell and SIGHUP under nohup, stays so.
    """
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, lambda *_: os._exit(os.EX_TEMPFAIL))


@contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Within, while a command loads what it needs, SIGINT ends the process with status 130, without a trace."""
    found = signal.getsignal(signal.SIGINT)
    if found is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, found)
