"""Ranks of launcher=local do not outlive the process that started them: nobody would know of them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER = "REFORMER_LAUNCHER"  # in a rank's environment: the process that started it
PR_SET_PDEATHSIG = 1  # of Linux


def stop_with_launcher() -> None:
    """From now on this rank gets SIGTERM when its launcher ends, even if that was killed; on Linux only."""
    if sys.platform == "linux" and os.environ.get(LAUNCHER) == str(os.getppid()):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
