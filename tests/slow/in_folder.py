"""Runs a module or script as a command in a folder, with bounds on memory and files. FOLDER TARGET ARGUMENT..."""

from __future__ import annotations

import os
import resource
import runpy
import sys

MEMORY, FILE = 6 * 2**30, 2**28  # bytes


def main() -> None:
    folder, target, *arguments = sys.argv[1:]
    os.chdir(folder)
    os.environ["HOME"] = folder
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
    sys.argv[:] = [target, *arguments]
    if target.endswith(".py"):
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
