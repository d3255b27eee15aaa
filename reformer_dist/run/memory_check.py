"""Memory of this machine, and the check that a run fits into it before anything is built."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from reformer_dist.config import RunConfig
from reformer_dist.config.stages import resolve_stages
from reformer_dist.distributed import runtime
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import ConfigError
from reformer_dist.planning import JobSpec, plan_memory
from reformer_dist.planning.memory import MemorySnapshot
from reformer_dist.planning.plan import format_bytes
from reformer_dist.planning.states import CHECKPOINT_COPY, GRADIENT_BYTES, GRADIENTS, OPTIMIZER, WEIGHTS
from reformer_dist.process.log import logger
from reformer_dist.tasks import Task

MEMINFO, CGROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
# plans of real runs were at most a fifth too high (docs/planning.md), so a run beyond this factor can't fit
MARGIN = 1.5
STATES = (WEIGHTS, GRADIENTS, OPTIMIZER, CHECKPOINT_COPY)


def free_memory(device: str, ranks_per_node: int) -> float | None:
    """Bytes per rank: memory of its GPU, or its share of the main memory that is free now. None if unknown."""
    return _memory(device, ranks_per_node, "MemAvailable")


def machine_memory(device: str, ranks_per_node: int) -> float | None:
    """Bytes per rank: memory of its GPU, or its share of the main memory, free or not. None if unknown."""
    return _memory(device, ranks_per_node, "MemTotal")


def require_memory(config: RunConfig, job: Runtime, task: Task) -> None:
    """Raises ConfigError, with the plan's numbers, if this machine can't hold a step; warns if it might not.

    In a run of several stages, the largest step counts.
    """
    device, per_node = job.device.type, runtime.ranks_per_node()
    limit = machine_memory(device, per_node)
    if limit is None:
        return
    if config.deepspeed.offload_optimizer and device == "cuda":  # the plan counts both memories as one
        limit += machine_memory("cpu", per_node) or 0.0
    n_elements, most = config.deepspeed.reduce_bucket_size, int(limit / GRADIENT_BYTES)
    # allocated whole, although a CPU only holds the part that is filled
    if config.deepspeed.stage > 0 and n_elements > most:
        requirement = f"must be at most {most}, the float32 gradients that this machine can hold per rank"
        raise ConfigError(f"deepspeed.reduce_bucket_size={n_elements}: {requirement}")
    spec, peak = plan_largest_step(config, job, task)
    if peak.total <= limit:
        return
    amount = f"a step needs {format_bytes(peak.total)} per rank ({_parts(peak)})"
    message = f"{_sizes(spec, peak)}: {amount}, but this machine has {format_bytes(limit)} for each; see --dry-run"
    if peak.total > MARGIN * limit:
        raise ConfigError(message)
    logger.warning(f"{message}. The run may be killed when memory runs out")


def plan_largest_step(config: RunConfig, job: Runtime, task: Task) -> tuple[JobSpec, MemorySnapshot]:
    """The stage of a run that needs the most memory, and what its step needs. Raises ConfigError."""
    configs = [stage.config for stage in resolve_stages(config)]
    sizes = (job.world_size, runtime.ranks_per_node(), task.vocab_size, job.device.type)
    specs = [JobSpec(each, *sizes) for each in configs]
    plans = [(spec, plan_memory(spec, task.build_model)) for spec in specs]
    return max(plans, key=lambda plan: plan[1].total)


def _sizes(spec: JobSpec, peak: MemorySnapshot) -> str:
    """The keys that the plan depends on, with their values, those of its largest part first."""
    config, model = spec.config, spec.config.model
    widths = f"model.dim={model.dim}, model.n_layers={model.n_layers}, model.ff_dim={model.resolved_ff_dim}"
    rows = f"data.batch_size={config.data.batch_size} in {spec.n_micro} micro-batches"
    tokens = f"data.seq_len={config.data.seq_len}, model.n_hashes={model.n_hashes}, {rows}"
    largest = max(peak.parts, key=lambda part: peak.parts[part])
    return f"{widths}, {tokens}" if largest in STATES else f"{tokens}, {widths}"


def _parts(peak: MemorySnapshot) -> str:
    """The three largest parts of the plan."""
    largest = sorted(peak.parts, key=lambda part: -peak.parts[part])[:3]
    return ", ".join(f"{part} {format_bytes(peak.parts[part])}" for part in largest)


def _memory(device: str, ranks_per_node: int, field: str) -> float | None:
    if device == "cuda":
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    if not MEMINFO.is_file():
        return None
    size = re.search(rf"{field}:\s+(\d+) kB", MEMINFO.read_text())
    return min(float(size[1]) * 1024, _container_limit()) / ranks_per_node if size else None


def _container_limit() -> float:
    """Bytes that the control group of this process may use; infinite without a limit."""
    paths = (CGROUPS / "memory.max", CGROUPS / "memory" / "memory.limit_in_bytes")
    texts = [path.read_text().strip() for path in paths if path.is_file()]
    return min((float(text) for text in texts if text.isdecimal()), default=float("inf"))
