"""Handlers of SIGTERM, SIGINT and SIGHUP. Before training begins, they end the process, which can be restarted.
During training, `training.preemption.StopSignal` saves a checkpoint first.

Imports nothing slow: PyTorch and DeepSpeed take seconds to load, and signals must be handled in the meantime.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

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
def handling(
    signals: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Installs a handler for the block. A signal that is ignored stays ignored."""
    handled = [signum for signum in signals if signal.getsignal(signum) is not signal.SIG_IGN]
    previous = {signum: signal.signal(signum, handler) for signum in handled}
    try:
        yield
    finally:
        for signum, previous_handler in previous.items():
            signal.signal(signum, previous_handler)


def exit_on_interrupt() -> AbstractContextManager[None]:
    """SIGINT within the block ends the process with INTERRUPTED and no traceback. For the imports of a command."""
    return handling([signal.SIGINT], lambda *_: os._exit(INTERRUPTED))


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
