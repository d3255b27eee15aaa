"""`reformer-train ... --dry-run`: what would run, shown without running it, on whatever machine."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from reformer_dist.config import LauncherKind, RunConfig
from reformer_dist.distributed import runtime
from reformer_dist.engine.setup import deepspeed_dict
from reformer_dist.errors import ConfigError
from reformer_dist.planning import JobSpec, describe, make_plan
from reformer_dist.run.compose import to_yaml
from reformer_dist.run.data import open_training_corpus
from reformer_dist.tasks import make_task

FLAG = "--dry-run"
UNITS = {"MIB": 2**20, "GIB": 2**30, "MB": 10**6, "GB": 10**9}
MEMINFO = Path("/proc/meminfo")


def dry_run(config: RunConfig, flag: str) -> None:
    """Prints the plan on rank 0. Raises the UserError that a run would raise of its configuration or data."""
    memory = read_memory(flag)
    device = "cuda" if memory is not None or torch.cuda.is_available() else "cpu"
    ranks_per_node, world_size = count_ranks(config)
    micro, n_micro = config.micro_batching(world_size)
    if device == "cpu":
        deepspeed_dict(config.deepspeed, config.optim, config.trainer.precision, micro, n_micro)
    corpus = open_training_corpus(config)
    task = make_task(config, corpus.tokenizer, corpus.labels)
    task.check(corpus)
    plan = make_plan(JobSpec(config, world_size, ranks_per_node, task.vocab_size, device), task.build_model)
    plan = replace(plan, memory_limit=memory or _memory_here(device, ranks_per_node))
    if runtime.env_rank() == 0:
        sys.stdout.write(to_yaml(config) + "\n" + describe(plan) + "\n")


def read_memory(flag: str) -> float | None:
    """Bytes of a GPU as the flag gives them. Raises ConfigError."""
    _, _, words = flag.partition("=")
    if flag == FLAG:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)", words)
    if found is None or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise ConfigError(f"{flag}: must be the memory of a GPU with its unit, such as {FLAG}=80GiB")
    return float(found[1]) * UNITS[found[2].upper()]


def count_ranks(config: RunConfig) -> tuple[int, int]:
    """(ranks of a machine, ranks of the job): as the launcher's keys or the surrounding launcher give them.

    Raises ConfigError.
    """
    launcher = config.launcher
    if runtime.is_rank():
        return runtime.ranks_per_node(), runtime.env_world_size()
    launcher.require_read()
    default = torch.cuda.device_count() if launcher.kind is not LauncherKind.none else 1
    per_node = launcher.nproc_per_node or max(1, default)
    return per_node, per_node * launcher.n_nodes


def _memory_here(device: str, ranks_per_node: int) -> float | None:
    """Bytes that each rank may take of this machine: its GPU's, or its share of what main memory is free."""
    if device == "cuda":
        return float(torch.cuda.get_device_properties(0).total_memory)
    if not MEMINFO.is_file():
        return None
    available = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text())
    return float(available[1]) * 1024 / ranks_per_node if available else None
