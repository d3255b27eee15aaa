"""The plan of a run: what `reformer-train --dry-run` shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from reformer_dist.planning.flops import step_flops
from reformer_dist.planning.libraries import measure_libraries
from reformer_dist.planning.memory import MemoryPlan, Moment
from reformer_dist.planning.parameters import count_parameters
from reformer_dist.planning.sizes import Job
from reformer_dist.planning.traffic import Traffic, exchange_traffic, zero_traffic


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


def make_plan(job: Job, build_model: Callable[[], nn.Module], memory_limit: float | None = None) -> Plan:
    """Computes the plan; build_model: of the task. Raises ConfigError where ranks or batch do not divide."""
    job.config.micro_batching(job.world_size)
    count = count_parameters(build_model)
    return Plan(
        job=job,
        n_parameters=count.total,
        peak=MemoryPlan(job, count).peak(),
        libraries=measure_libraries(job) if job.device == "cpu" else 0.0,
        traffic=zero_traffic(job, count) | exchange_traffic(job) if job.world_size > 1 else {},
        flops=step_flops(job),
        memory_limit=memory_limit,
    )
