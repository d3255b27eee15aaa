"""What a run was started with: for each start, a line of starts.jsonl in its directory; and a log of each rank."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

import reformer_dist
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.fs.append import AppendFile
from reformer_dist.process.cores import usable_cores
from reformer_dist.process.log import open_log_file
from reformer_dist.process.version import package_version

STARTS_FILE, LOGS_FOLDER = "starts.jsonl", "logs"
PACKAGES = ("torch", "deepspeed", "triton", "hydra-core", "webdataset", "safetensors", "numpy")
VARIABLES = re.compile(
    r"(CUDA|DS|GLOO|GOMP|KMP|MKL|NCCL|OMP|PYTORCH|REFORMER|TORCH|TRITON|UCX)_\w+|LD_PRELOAD|LD_LIBRARY_PATH"
    r"|PYTHONPATH|MASTER_(ADDR|PORT)|SLURM_JOB_(ID|NAME|NODELIST|NUM_NODES|PARTITION)|\w*CUBLAS_WORKSPACE_CONFIG"
)
"""Environment variables that change what a run computes, or how fast."""
SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")
GIT_SECONDS = 5.0


def record_start(folder: Path, step: int, runtime: Runtime) -> None:
    """Opens the log file of each rank, and appends a line about this start to starts.jsonl.

    step: from which it goes on. Every rank calls this, once nothing can refuse the run. Raises UserError together.
    """

    def open_log() -> None:
        (folder / LOGS_FOLDER).mkdir(exist_ok=True)
        open_log_file(folder / LOGS_FOLDER / f"rank-{runtime.rank:05d}.log")

    runtime.together(open_log)
    ranks = runtime.gather((socket.gethostname(), _device_name(runtime.device)))
    runtime.on_main(lambda: _append(folder / STARTS_FILE, describe_start(step, ranks)))


def describe_start(step: int, ranks: list[tuple[str, str]]) -> dict[str, Any]:
    """The line of starts.jsonl, as JSON values. ranks: host and device of each."""
    hosts: dict[str, dict[str, Any]] = {}
    for rank, (host, device) in enumerate(ranks):
        hosts.setdefault(host, {"device": device, "ranks": []})["ranks"].append(rank)
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "working_directory": str(Path.cwd()),
        "world_size": len(ranks),
        "hosts": hosts,
        "machine": {
            "system": platform.platform(),
            "cores": usable_cores(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        },
        "versions": _versions(),
        "commits": {str(path): commit for path in _sources() if (commit := git_commit(path)) is not None},
        "environment": relevant_variables(os.environ),
    }


def relevant_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those that matter for a run, without any that may hold a secret."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if VARIABLES.fullmatch(name) and not SECRET.search(name)
    }


def git_commit(folder: Path) -> str | None:
    """The commit of the repository of a directory, with " and changes" if files differ; None without one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return f"{commit} and changes" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _sources() -> list[Path]:
    """The package and the working directory, either of which may be in a repository."""
    return list(dict.fromkeys((Path(reformer_dist.__file__).resolve().parents[1], Path.cwd())))


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "reformer_dist": reformer_dist.__version__}
    versions |= {name: version for name in PACKAGES if (version := package_version(name)) is not None}
    if torch.cuda.is_available():
        versions["cuda"] = torch.version.cuda or "none"
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _append(path: Path, record: dict[str, Any]) -> None:
    file = AppendFile(path)
    file.write(json.dumps(record).encode() + b"\n")
    file.close()
