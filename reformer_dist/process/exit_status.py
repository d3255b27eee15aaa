"""Exit statuses of the commands and their ranks. Imports nothing slow."""

from __future__ import annotations

import os
import signal

FAILED = 1
"""An error, which has been reported in one message."""
PREEMPTED = os.EX_TEMPFAIL
"""75: stopped by a signal after saving. The same command resumes."""
KILLED = 128
"""Plus n: killed by signal n, as a shell reports it."""
INTERRUPTED = KILLED + signal.SIGINT
"""130."""
BROKEN_PIPE = KILLED + signal.SIGPIPE
"""141: the reader of standard output or error exited before the command was done."""
