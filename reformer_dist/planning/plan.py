"""The resource plan of a run, as `reformer-train --dry-run` prints it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from reformer_dist.config.stages import Stage
from reformer_dist.planning.flops import step_flops
from reformer_dist.planning.memory import MemorySnapshot, StepMemory
from reformer_dist.planning.sizes import JobSpec
from reformer_dist.planning.states import ParameterCount, count_parameters
from reformer_dist.planning.traffic import Traffic, exchange_traffic, zero_traffic

MIB, GIB = 2**20, 2**30
# a rank with negligible tensors, after its first step; DeepSpeed imports modules depending on its stage
RANK_SCRIPT = """
import resource, sys
from pathlib import Path
import torch
import reformer_dist.run.build
from reformer_dist.config import ModelConfig, Position, Precision, RunConfig
from reformer_dist.distributed import runtime
from reformer_dist.engine import TrainEngine
from reformer_dist.models import ReformerLM
from reformer_dist.models.block import Block

runtime.start()
torch.set_num_threads(1)
config = RunConfig(model=ModelConfig(dim=16, n_heads=2, n_layers=2, n_buckets=4, position=Position.rotary))
config.deepspeed.stage, config.trainer.precision = int(sys.argv[1]), Precision(sys.argv[2])
engine = TrainEngine(ReformerLM(config.model, 16), [Block], config, 1)
tokens = torch.zeros(1, 64, dtype=torch.int64)
for micro in range(engine.n_micro):
    engine.backward(engine.forward(tokens, tokens, step=0, dropout_seed=0), 64.0)
engine.step(lr=0.001)
print(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
"""


@dataclass(frozen=True)
class RunPlan:
    """Resources of one step: memory of one rank, traffic sent by one rank, FLOPs of all ranks."""

    job: JobSpec
    count: ParameterCount
    peak: MemorySnapshot
    libraries: float
    """Bytes of the interpreter and its libraries, which share host memory with the tensors; 0 on a GPU."""
    traffic: Traffic
    flops: float
    memory_limit: float | None
    """Bytes available to a rank; None if unknown."""

    @property
    def total(self) -> float:
        """Peak bytes of a rank."""
        return self.peak.total + self.libraries

    @property
    def fits(self) -> bool | None:
        return None if self.memory_limit is None else self.total <= self.memory_limit

    @property
    def largest(self) -> str:
        """The largest category at the peak."""
        return max(self.peak.parts, key=lambda part: self.peak.parts[part])


def make_plan(
    job: JobSpec,
    build_model: Callable[[], nn.Module],
    memory_limit: float | None = None,
    libraries: float | None = None,
) -> RunPlan:
    """Computes the plan. build_model: the task's. libraries: measured if None.

    Raises ConfigError if ranks or batch do not divide.
    """
    if libraries is None:
        libraries = measure_libraries(job) if job.device == "cpu" else 0.0
    job.config.micro_batching(job.world_size)
    count = count_parameters(build_model, job.config.optim)
    return RunPlan(
        job=job,
        count=count,
        peak=StepMemory(job, count).peak(),
        libraries=libraries,
        traffic=zero_traffic(job, count) | exchange_traffic(job) if job.world_size > 1 else {},
        flops=step_flops(job),
        memory_limit=memory_limit,
    )


def plan_memory(job: JobSpec, build_model: Callable[[], nn.Module]) -> MemorySnapshot:
    """The peak of the tensors of one rank. build_model: the task's. Raises ConfigError if ranks do not divide."""
    return StepMemory(job, count_parameters(build_model, job.config.optim)).peak()


def measure_libraries(job: JobSpec) -> float:
    """Resident bytes of a process that has trained a tiny model at the job's settings; 0 if they can't be read."""
    if sys.platform != "linux":
        return 0.0
    arguments = [str(job.config.deepspeed.stage), job.config.trainer.precision.value]
    done = subprocess.run(
        [sys.executable, "-c", RANK_SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return float(done.stdout.split()[-1]) if done.returncode == 0 else 0.0


def describe(plan: RunPlan) -> str:
    """The plan as text: the job; the optimizer's groups; memory by category and whether it fits; traffic."""
    parts = (_job_lines(plan), _optimizer_lines(plan), _memory_lines(plan), _traffic_lines(plan))
    return "\n\n".join("\n".join(lines) for lines in parts)


def describe_stages(plans: Sequence[tuple[Stage, RunPlan]], last_step: int) -> list[str]:
    """A line for each stage of a run that ends at `last_step`, with the values that it sets, and the totals."""
    lines = ["stages        steps            tokens/step      peak memory     TFLOP/step  sets"]
    flops = tokens = 0.0
    for stage, plan in plans:
        end = min(last_step, stage.end_step or last_step)
        n_steps, data = max(0, end - stage.first_step), stage.config.data
        flops += n_steps * plan.flops
        tokens += n_steps * data.batch_size * data.seq_len
        steps = f"{stage.first_step + 1:,}-{end:,}" if n_steps else "none"
        rows = f"{data.batch_size} x {data.seq_len:,}"
        values = " ".join(f"{key}={value}" for key, value in stage.values.items())
        parts = f"{steps:<17}{rows:<17}{format_bytes(plan.total):<16}{plan.flops / 1e12:<12,.3f}"
        lines.append(f"  {stage.index + 1:<12}{parts}{values}".rstrip())
    return [*lines, f"  total       {last_step:,} steps, {tokens:,.0f} tokens, {flops / 1e12:,.3f} TFLOP"]


def format_bytes(n_bytes: float) -> str:
    """Formats as 1.50 GiB or 12.0 MiB."""
    return f"{n_bytes / GIB:,.2f} GiB" if n_bytes >= GIB else f"{n_bytes / MIB:,.1f} MiB"


def _job_lines(plan: RunPlan) -> list[str]:
    job, config, data = plan.job, plan.job.config, plan.job.config.data
    micro, n_micro = config.micro_batching(job.world_size)
    heads, buckets = job.mesh_shape
    tokens = data.batch_size * data.seq_len
    source_tokens = f" and {data.batch_size * config.task.max_source_len:,} source tokens" if job.encoder else ""
    ranks = f"{job.world_size} rank{'s' if job.world_size > 1 else ''} on {job.device}"
    shared = f"{heads} x {buckets} (heads x buckets) ranks share each sequence"
    return [
        f"ranks         {ranks}, {job.ranks_per_node} per node; "
        f"{config.dp_size(job.world_size)} data-parallel"
        + (f", {shared}" if config.parallel.sequence > 1 else ""),
        f"step          {tokens:,} tokens{source_tokens}: {data.batch_size} rows of {data.seq_len:,}, "
        f"{n_micro} micro-batch{'es' if n_micro > 1 else ''} of {micro} per rank",
        f"parameters    {plan.count.total:,}; ZeRO stage {config.deepspeed.stage}, "
        f"{config.trainer.precision.name}",
        f"compute       {plan.flops / 1e12:,.3f} TFLOP/step ({plan.flops / tokens / 1e6:,.1f} MFLOP/token)",
    ]


def _optimizer_lines(plan: RunPlan) -> list[str]:
    """A line per parameter group."""
    lines = ["optimizer groups"]
    for group in plan.count.groups:
        size = f"{len(group.shapes):,} tensors, {sum(group.sizes):,} parameters"
        lines.append(f"  {group.update.value:<22}{size}, lr {group.lr:g}, weight decay {group.weight_decay:g}")
    frozen = [f"  {'frozen':<22}{plan.count.frozen:,} parameters"] if plan.count.frozen else []
    return [*lines, *frozen]


def _memory_lines(plan: RunPlan) -> list[str]:
    lines = [f"peak memory per rank ({plan.peak.name})"]
    for part, amount in plan.peak.parts.items():
        mark = "  <- largest" if part == plan.largest else ""
        lines.append(f"  {part:<22}{format_bytes(amount):>12}{mark}")
    if plan.libraries:
        lines.append(f"  {'Python and libraries':<22}{format_bytes(plan.libraries):>12}  (measured)")
    lines.append(f"  {'total':<22}{format_bytes(plan.total):>12}")
    if plan.memory_limit is None:
        lines.append("  device memory unknown; pass it as --dry-run=80GiB")
    else:
        verdict = "fits in" if plan.fits else "DOES NOT FIT in"
        lines.append(f"  {verdict} {format_bytes(plan.memory_limit)}")
    return lines


def _traffic_lines(plan: RunPlan) -> list[str]:
    if not plan.traffic:
        return ["traffic       none (one rank)"]
    lines = ["traffic sent per rank and step"]
    lines += [f"  {part:<22}{format_bytes(amount):>12}" for part, amount in plan.traffic.items()]
    return [*lines, f"  {'total':<22}{format_bytes(sum(plan.traffic.values())):>12}"]
