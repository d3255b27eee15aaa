"""SIGTERM, SIGINT and SIGHUP before training begins: they end the process, which can simply be started again.

Imports nothing slow: PyTorch and DeepSpeed take seconds to load, and signals must be handled meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from reformer_dist.process.exit_status import INTERRUPTED, PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LAUNCHER = "REFORMER_LAUNCHER"  # environment variable of a rank: pid of the process that started it
PR_SET_PDEATHSIG = 1  # of Linux


def exit_on_signal() -> None:
    """From now on each of SIGNALS ends the process with PREEMPTED. Only for the main thread.

    A signal that is ignored stays ignored, as SIGINT is in background jobs of a shell, and SIGHUP under nohup.
    """
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, lambda *_: os._exit(PREEMPTED))


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """SIGINT within the block ends the process with INTERRUPTED and no traceback. For the imports of a command."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def terminate_with_launcher() -> None:
    """From now on this rank receives SIGTERM when its launcher exits, even if that was killed. Linux only."""
    terminate = terminate_with_parent()
    if terminate is not None and os.environ.get(LAUNCHER) == str(os.getppid()):
        terminate()


def terminate_with_parent() -> Callable[[], None] | None:
    """A function after which the calling process receives SIGTERM when its parent exits; None if not on Linux.

    libc is loaded here, so that the function itself may be called between fork and exec.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
