"""What SIGTERM, SIGINT and SIGHUP mean to a process that has not begun to work: it ends, and may be started again.

Imports nothing slow, since PyTorch and DeepSpeed take seconds to load, and a scheduler may not wait for them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
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


LAUNCHER = "REFORMER_LAUNCHER"  # in a rank's environment: the process that started it
PR_SET_PDEATHSIG = 1  # of Linux


def stop_with_launcher() -> None:
    """From now on this rank gets SIGTERM when its launcher ends, even if that was killed; on Linux only."""
    if sys.platform == "linux" and os.environ.get(LAUNCHER) == str(os.getppid()):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
