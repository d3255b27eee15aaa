"""Launches a benchmark as one job per row of its table, with a mesh of heads x buckets ranks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_job(script: str, mesh: str) -> dict[str, Any]:
    """Runs the script under torchrun with --row MESH; returns the JSON object that rank 0 prints last."""
    n_ranks = math.prod(map(int, mesh.split("x")))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
    command = [sys.executable, *launch, str(Path(script).resolve()), *sys.argv[1:], "--row", mesh]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the job of mesh {mesh} exited with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
