"""What a rank leaves when memory runs out: the plan, the keys that would help, and what was in memory.

On a GPU also a snapshot of PyTorch's allocator, for https://pytorch.org/memory_viz.
"""

from __future__ import annotations

import gc
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reformer_dist.config import RunConfig
from reformer_dist.distributed.runtime import Runtime, ranks_per_node
from reformer_dist.errors import ConfigError, OutOfMemory, UserError
from reformer_dist.planning import JobSpec, plan_memory
from reformer_dist.planning.memory import MemorySnapshot
from reformer_dist.planning.plan import format_bytes
from reformer_dist.run.data import open_task_data
from reformer_dist.run.memory_check import free_memory, machine_memory, plan_largest_step

FOLDER = "out_of_memory"
SHOWN_TENSORS = 20
# of the allocators of PyTorch for main memory, which have no exception of their own
CPU_MESSAGE = "DefaultCPUAllocator"


@contextmanager
def reported(config: RunConfig, job: Runtime) -> Iterator[None]:
    """Raises OutOfMemory on this rank if memory runs out within the block, and leaves a report in output_dir."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        plan = _Plan.of(config, job)
        changes = [] if plan is None else plan.changes()[:2]
        reason = str(error).splitlines()[0].strip() if str(error).strip() else "the interpreter needs more"
        where = _write(Path(config.output_dir) / FOLDER, job, plan, error)
        advice = "; ".join([*changes, where]) if changes else f"see --dry-run; {where}"
        raise OutOfMemory(f"rank {job.rank}: out of memory: {reason}; {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or CPU_MESSAGE in str(error)


def _write(folder: Path, job: Runtime, plan: _Plan | None, error: BaseException) -> str:
    """Writes the report; returns where it is, for a message."""
    path = folder / f"rank-{job.rank:05d}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if job.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(path.with_suffix(".pickle")))
        path.write_text("\n".join(_report(job, plan, error)) + "\n")
    except OSError as failed:
        return f"{path} can't be written ({failed.strerror})"
    return f"see {path}"


def _report(job: Runtime, plan: _Plan | None, error: BaseException) -> list[str]:
    lines = [f"{type(error).__name__}: {error}".strip(), ""]
    device, per_node = job.device.type, ranks_per_node()
    if plan is not None:
        parts = [*plan.peak.parts.items(), ("total", plan.peak.total)]
        lines += [f"planned peak of a rank ({plan.peak.name})"]
        lines += [f"  {part:<22}{format_bytes(amount):>12}" for part, amount in parts]
        lines += ["", "changes that would help", *(f"  {change}" for change in plan.changes()), ""]
    limit, free = machine_memory(device, per_node), free_memory(device, per_node)
    if limit is not None and free is not None:
        lines += [f"this machine has {format_bytes(limit)} for a rank, {format_bytes(free)} of it free now", ""]
    lines += ["largest tensors that Python knows", *_largest_tensors(), ""]
    if device == "cuda":
        lines += [torch.cuda.memory_summary(job.device)]
    return [*lines, *traceback.format_exception(error)]


def _largest_tensors() -> list[str]:
    """The shapes with the most bytes; tensors that share memory count once."""
    storages: dict[int, Tensor] = {}
    for each in gc.get_objects():
        with suppress(Exception):  # such as tensors without storage
            # not isinstance, which asks objects of other libraries for their class
            if issubclass(type(each), Tensor) and each.device.type != "meta":
                storages.setdefault(each.untyped_storage().data_ptr(), each)
    sizes: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for tensor in storages.values():
        name = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"
        sizes[name] += tensor.untyped_storage().nbytes()
        numbers[name] += 1
    largest = sizes.most_common(SHOWN_TENSORS)
    return [f"  {format_bytes(size):>12}  {numbers[name]} x {name}" for name, size in largest]


@dataclass(frozen=True)
class _Plan:
    """The plan of the run whose memory ran out."""

    job: JobSpec
    build_model: Callable[[], nn.Module]
    peak: MemorySnapshot
    staged: frozenset[str] = frozenset()
    """Keys that stages set, so that an override may not reach the step."""

    @classmethod
    def of(cls, config: RunConfig, job: Runtime) -> _Plan | None:
        """None if it can't be made, such as without the dataset."""
        try:
            task = open_task_data(config).task
            spec, peak = plan_largest_step(config, job, task)
            return cls(spec, task.build_model, peak, frozenset(key for stage in config.stages for key in stage))
        except (UserError, OSError):
            return None

    def changes(self) -> list[str]:
        """Overrides that lower the peak, the best first; last, those that change what is trained."""
        totals: dict[str, float] = {}
        for key, value in ((key, value) for key, value in self._candidates() if key not in self.staged):
            with suppress(ConfigError):  # such as more ranks for a sequence than there are
                job = replace(self.job, config=_with(self.job.config, key, value))
                total = plan_memory(job, self.build_model).total
                if total < self.peak.total:
                    totals[f"{key}={str(value).lower()}"] = total
        best = sorted(totals, key=lambda override: (override.startswith("data."), totals[override]))
        return [f"{each}: {format_bytes(totals[each])}, not {format_bytes(self.peak.total)}" for each in best]

    def _candidates(self) -> Iterator[tuple[str, Any]]:
        config, (rows, _) = self.job.config, self.job.config.micro_batching(self.job.world_size)
        yield from (("trainer.micro_batch_size", size) for size in sorted({rows // 2, 1}) if 0 < size < rows)
        yield from (("deepspeed.stage", stage) for stage in range(config.deepspeed.stage + 1, 4))
        if self.job.device == "cuda":
            yield "deepspeed.offload_optimizer", True
            yield "trainer.precision", "bf16"
        yield "model.recompute", "reversible"
        yield "model.ff_chunk", max(1, (config.model.ff_chunk or config.data.seq_len) // 8)
        yield "model.loss_chunk", max(1, config.model.loss_chunk // 4)
        yield "parallel.sequence", 2 * config.parallel.sequence
        yield "data.seq_len", config.data.seq_len // 2


def _with(config: RunConfig, key: str, value: Any) -> RunConfig:
    """Raises ConfigError."""
    group, name = key.split(".")
    return replace(config, **{group: replace(getattr(config, group), **{name: value})})
