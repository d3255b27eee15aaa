"""The plan of a run: what `reformer-train --dry-run` shows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from reformer_dist.planning.flops import step_flops
from reformer_dist.planning.memory import MemoryPlan, Moment
from reformer_dist.planning.parameters import count_parameters
from reformer_dist.planning.sizes import Job
from reformer_dist.planning.traffic import Traffic, exchange_traffic, zero_traffic

# what a rank has loaded before it builds its model, and what is then in memory
IMPORTS = """
from pathlib import Path
import reformer_dist.build
from reformer_dist.distributed import runtime
from reformer_dist.engine.setup import import_deepspeed
import_deepspeed()
runtime.start()
import torch, resource
layer = torch.nn.Linear(8, 8)
layer(torch.ones(1, 8)).sum().backward()
torch.optim.AdamW(layer.parameters()).step()
print(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
"""


@dataclass(frozen=True)
class Plan:
    """What one step needs; memory is that of one rank, traffic what one rank sends."""

    job: Job
    n_parameters: int
    peak: Moment
    libraries: float
    """Bytes of the interpreter and its libraries, which share a CPU's memory with the tensors; 0 for a GPU."""
    traffic: Traffic
    flops: float
    memory_limit: float | None
    """Bytes that a rank may take; None if unknown."""

    @property
    def total(self) -> float:
        """Bytes of a rank at its peak."""
        return self.peak.total + self.libraries

    @property
    def fits(self) -> bool | None:
        return None if self.memory_limit is None else self.total <= self.memory_limit

    @property
    def largest(self) -> str:
        """The part that takes most."""
        return max(self.peak.parts, key=lambda part: self.peak.parts[part])


def make_plan(job: Job, memory_limit: float | None = None) -> Plan:
    """Computes the plan. Raises ConfigError where the job's ranks or batch do not divide."""
    job.config.micro_batching(job.world_size)
    count = count_parameters(job.config.model, job.vocab_size)
    return Plan(
        job=job,
        n_parameters=count.total,
        peak=MemoryPlan(job, count).peak(),
        libraries=measure_libraries() if job.device == "cpu" else 0.0,
        traffic=zero_traffic(job, count) | exchange_traffic(job) if job.world_size > 1 else {},
        flops=step_flops(job),
        memory_limit=memory_limit,
    )


def measure_libraries() -> float:
    """Bytes resident in a process that has loaded what a rank loads; 0 where they can't be read."""
    if sys.platform != "linux":
        return 0.0
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return float(done.stdout.split()[-1]) if done.returncode == 0 else 0.0
