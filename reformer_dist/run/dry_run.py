"""`reformer-train ... --dry-run`: prints the configuration and plan of a run without running it."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import torch

from reformer_dist.config import LauncherKind, RunConfig
from reformer_dist.distributed import runtime
from reformer_dist.engine.setup import deepspeed_dict
from reformer_dist.errors import ConfigError
from reformer_dist.planning import JobSpec, describe, make_plan
from reformer_dist.run.compose import to_yaml
from reformer_dist.run.data import open_task_data
from reformer_dist.run.memory import free_memory

FLAG = "--dry-run"
UNITS = {"MIB": 2**20, "GIB": 2**30, "MB": 10**6, "GB": 10**9}


def dry_run(config: RunConfig, flag: str) -> None:
    """Prints the plan on rank 0. Raises the UserError that the run would raise for its configuration or data."""
    memory = read_memory(flag)
    device = "cuda" if memory is not None or torch.cuda.is_available() else "cpu"
    ranks_per_node, world_size = count_ranks(config)
    micro, n_micro = config.micro_batching(world_size)
    if device == "cpu":
        deepspeed_dict(config.deepspeed, config.optim, config.trainer.precision, micro, n_micro)
    task = open_task_data(config).task
    plan = make_plan(JobSpec(config, world_size, ranks_per_node, task.vocab_size, device), task.build_model)
    plan = replace(plan, memory_limit=memory or free_memory(device, ranks_per_node))
    if runtime.env_rank() == 0:
        sys.stdout.write(to_yaml(config) + "\n" + describe(plan) + "\n")


def read_memory(flag: str) -> float | None:
    """Parses the GPU memory of the flag, in bytes; None without one. Raises ConfigError."""
    _, _, size = flag.partition("=")
    if flag == FLAG:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)", size)
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise ConfigError(f"{flag}: must be the memory of a GPU with its unit, such as {FLAG}=80GiB")
    return float(match[1]) * UNITS[match[2].upper()]


def count_ranks(config: RunConfig) -> tuple[int, int]:
    """(ranks per node, ranks of the job) of a rank's environment or the launcher's keys. Raises ConfigError."""
    launcher = config.launcher
    if runtime.is_rank():
        return runtime.ranks_per_node(), runtime.env_world_size()
    launcher.refuse_unused_keys()
    default = torch.cuda.device_count() if launcher.kind is not LauncherKind.none else 1
    per_node = launcher.nproc_per_node or max(1, default)
    return per_node, per_node * launcher.n_nodes
