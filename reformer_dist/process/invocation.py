"""The command line that started this process, for messages that say how to continue."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from reformer_dist.process.signals import LAUNCHER

PROGRAMS = {"reformer-train": "reformer-train", "train.py": "python -m reformer_dist.train"}


def repeat_with(changes: Mapping[str, object]) -> str:
    """The command with these overrides in place of its own, to be pasted into a shell.

    Where another launcher or program started this process, only the overrides are known.
    """
    added = [f"{key}={value}" for key, value in changes.items()]
    program = PROGRAMS.get(Path(sys.argv[0]).name)
    if program is None or ("RANK" in os.environ and LAUNCHER not in os.environ):
        return f"the same command with {shlex.join(added)}"
    kept = [word for word in sys.argv[1:] if word.partition("=")[0].lstrip("+") not in changes]
    return f"{program} {shlex.join([*kept, *added])}"
