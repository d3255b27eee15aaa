"""`reformer-train ... --dry-run`: prints the configuration and plan of a run without running it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from reformer_dist.config import LauncherKind, RunConfig
from reformer_dist.config.stages import Stage, check_ranks, resolve_stages
from reformer_dist.data import IdTokenizer
from reformer_dist.distributed import runtime
from reformer_dist.engine.setup import deepspeed_dict
from reformer_dist.errors import ConfigError
from reformer_dist.planning import JobSpec, describe, make_plan
from reformer_dist.planning.plan import RunPlan, describe_stages
from reformer_dist.planning.schedule_chart import draw_schedule, plot_schedule
from reformer_dist.run.compose import to_yaml
from reformer_dist.run.data import TrainingData, check_stages, open_task_data
from reformer_dist.run.memory_check import free_memory
from reformer_dist.run.options import DRY_RUN, VOCAB_SIZE
from reformer_dist.tasks import Task, make_task

UNITS = {"MIB": 2**20, "GIB": 2**30, "MB": 10**6, "GB": 10**9}


def dry_run(config: RunConfig, flag: str, plot: Path | None = None, vocab_size: int | None = None) -> None:
    """Prints the plan on rank 0. Raises the UserError that the run would raise for its configuration or data.

    plot: a PNG of the schedule is written there. vocab_size: as in `plan_run`.
    """
    memory = read_memory(flag)
    plans, last_step = plan_run(config, memory, vocab_size)
    stages = [stage for stage, _ in plans]
    index, largest = max(enumerate(plan for _, plan in plans), key=lambda item: item[1].total)
    limit = memory or free_memory(largest.job.device, largest.job.ranks_per_node)
    if runtime.env_rank() != 0:
        return
    parts = [to_yaml(config)]
    if len(stages) > 1:
        parts += [f"stage {index + 1} of {len(stages)}, whose steps need the most memory"]
    parts += [describe(replace(largest, memory_limit=limit)), ""]
    if len(stages) > 1:
        parts += [*describe_stages(plans, last_step), ""]
    parts += draw_schedule(config.optim, last_step, stages)
    sys.stdout.write("\n".join(parts) + "\n")
    if plot is not None:
        plot_schedule(config.optim, last_step, stages, plot)


def plan_run(
    config: RunConfig, memory: float | None = None, vocab_size: int | None = None
) -> tuple[list[tuple[Stage, RunPlan]], int]:
    """The plan of each stage of a run, and the run's last step. Raises UserError, as the run would.

    memory: bytes of a GPU to plan for; None plans for this machine. vocab_size: plans with a vocabulary of this
    size, and two labels for classification, without reading the datasets.
    """
    device = "cuda" if memory is not None or torch.cuda.is_available() else "cpu"
    ranks_per_node, world_size = count_ranks(config)
    check_ranks(config, world_size)
    stages = resolve_stages(config)
    first = stages[0].config
    if device == "cpu":
        deepspeed_dict(first.deepspeed, first.optim, first.trainer.precision, *first.micro_batching(world_size))
    if vocab_size is None:
        data = open_task_data(first)
        check_stages(config, data.corpus)
        task = data.task
        last_step = TrainingData.open(first, data.corpus, None).with_last_step(first, stages).trainer.max_steps
    else:
        task, last_step = _task_without_data(first, vocab_size), config.trainer.max_steps
    plans = _make_plans(stages, task, (world_size, ranks_per_node), device)
    return list(zip(stages, plans, strict=True)), last_step


def _task_without_data(config: RunConfig, vocab_size: int) -> Task:
    epochs = config.data.epochs
    if epochs > 0:
        requirement = f"the dataset says how many steps that takes; leave out {VOCAB_SIZE}, or set it to 0"
        raise ConfigError(f"data.epochs={epochs}: {requirement}")
    return make_task(config, IdTokenizer(vocab_size - 1), ["first", "second"])


def _make_plans(stages: Sequence[Stage], task: Task, ranks: tuple[int, int], device: str) -> list[RunPlan]:
    """ranks: of the job, and per node."""
    plans: list[RunPlan] = []
    for stage in stages:
        job = JobSpec(stage.config, *ranks, task.vocab_size, device)
        plans.append(make_plan(job, task.build_model, libraries=plans[0].libraries if plans else None))
    return plans


def read_memory(flag: str) -> float | None:
    """Parses the GPU memory of the flag, in bytes; None without one. Raises ConfigError."""
    _, _, size = flag.partition("=")
    if flag == DRY_RUN:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)", size)
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise ConfigError(f"{flag}: must be the memory of a GPU with its unit, such as {DRY_RUN}=80GiB")
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
