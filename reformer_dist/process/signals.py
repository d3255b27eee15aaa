"""Handlers of the signals that stop a run. Before training begins, they end the process, which can be restarted.
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
from pathlib import Path
from types import FrameType

from reformer_dist.process.exit_status import INTERRUPTED, PREEMPTED

# SLURM sends SIGUSR1 or SIGUSR2 ahead of a time limit where its option --signal says so
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
LAUNCHER = "REFORMER_LAUNCHER"  # environment variable of a rank: the process that started it, as host:pid
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


def launcher_id() -> str:
    """Value of LAUNCHER for the ranks that this process starts."""
    return f"{os.uname().nodename}:{os.getpid()}"


def terminate_with_launcher() -> None:
    """From now on this rank receives SIGTERM when its launcher exits, even if that was killed. Linux only.

    Ends the process with PREEMPTED if the launcher was killed before.
    """
    terminate = terminate_with_parent()
    host, _, launcher = os.environ.get(LAUNCHER, "").rpartition(":")
    if terminate is None or host != os.uname().nodename:
        return
    if launcher == str(os.getppid()):
        terminate()
    # not a child of a child: the variable is inherited
    if launcher != str(os.getppid()) and not _is_running(launcher):
        os._exit(PREEMPTED)


def _is_running(pid: str) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def terminate_with_parent() -> Callable[[], None] | None:
    """A function after which the calling process receives SIGTERM when its parent exits; None if not on Linux.

    libc is loaded here, so that the function itself may be called between fork and exec.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
