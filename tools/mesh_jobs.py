"""Benchmarks of shared sequences start one job for each row of their table: a grid of heads x buckets ranks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any


def in_own_job(script: str, grid: str) -> dict[str, Any]:
    """Runs the script again under torchrun, with --row GRID; the object that its rank 0 prints last."""
    n_ranks = math.prod(map(int, grid.split("x")))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
    command = [sys.executable, *launch, str(Path(script).resolve()), *sys.argv[1:], "--row", grid]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the job of grid {grid} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
