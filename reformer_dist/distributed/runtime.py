"""Runtime: rank, device, and collectives on host objects.

Tensors go over NCCL or gloo. The few host values that ranks agree on go over gloo, so that they never wait for a
GPU.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from reformer_dist.distributed.environment import (
    Preempted,
    SharedError,
    Unavailable,
    env_rank,
    env_world_size,
    explain,
    is_rank,
    ranks_per_node,
)
from reformer_dist.distributed.rendezvous import connect, launcher_hosts_store, rendezvous
from reformer_dist.errors import PeerLost, SourceUnavailable, UserError

__all__ = [
    "Preempted",
    "Runtime",
    "SharedError",
    "Unavailable",
    "env_rank",
    "env_world_size",
    "explain",
    "is_rank",
    "ranks_per_node",
    "start",
    "stop",
]

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
DRAIN_SECONDS = 0.1
RECORDED_COLLECTIVES = 2000


@dataclass(frozen=True)
class Runtime:
    """This process's rank in the job, its device, and collectives on host objects."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control_group: dist.ProcessGroup | None
    """A gloo group; None for the default group."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Elementwise sums over all ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control_group)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """All-gathers a picklable value of each rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def broadcast(self, value: T | None) -> T:
        """Rank 0's picklable value, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control_group)
        return values[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        dist.barrier(group=self.control_group)

    def raise_together(self, error: UserError | OSError | None) -> None:
        """Raises the errors of any rank on all ranks, as Unavailable if all are SourceUnavailable.

        Every rank calls this.
        """
        found = self.gather(None if error is None else (explain(error), isinstance(error, SourceUnavailable)))
        errors = [each for each in found if each is not None]
        if errors:
            kind = Unavailable if all(is_unavailable for _, is_unavailable in errors) else SharedError
            raise kind(_merge_messages([None if each is None else each[0] for each in found])) from error

    def together(self, action: Callable[[], T]) -> T:
        """Runs `action` on every rank; if any raises a UserError or OSError, all ranks raise it."""
        result: T | None = None
        error: UserError | OSError | None = None
        try:
            result = action()
        except (UserError, OSError) as raised:
            error = raised
        self.raise_together(error)
        return result  # type: ignore[return-value]

    def on_main(self, action: Callable[[], T]) -> T:
        """Runs `action` on rank 0; all ranks return its result, or raise its error."""
        result: T | None = None
        message: str | None = None
        cause: UserError | OSError | None = None
        if self.is_main:
            try:
                result = action()
            except (UserError, OSError) as error:
                message, cause = explain(error), error
        result, message = self.broadcast((result, message))
        if message is not None:
            raise SharedError(message) from cause
        return result  # type: ignore[return-value]


def _merge_messages(messages: list[str | None]) -> str:
    """Each distinct message once, with its ranks unless all ranks have the same."""
    ranks_of: dict[str, list[int]] = {}
    for rank, message in enumerate(messages):
        if message is not None:
            ranks_of.setdefault(message, []).append(rank)
    if messages[0] is not None and ranks_of[messages[0]] == list(range(len(messages))):
        return messages[0]
    return "\n".join(f"rank {', '.join(map(str, ranks))}: {message}" for message, ranks in ranks_of.items())


def start(timeout: timedelta = TIMEOUT, *, trace_prefix: str | None = None) -> Runtime:
    """Joins the job of torchrun, deepspeed or a similar launcher; without one, starts a job of one process.

    timeout: how long a rank waits for the others, here and in the collectives of all groups. trace_prefix: of the
    files, one per rank, in which NCCL's collectives before a timeout are recorded. Raises UserError on this rank
    alone if the launcher's environment is incomplete or the job can't be joined.
    """
    _check_environment()
    world_size, rank = env_world_size(), env_rank()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "nccl"
        if trace_prefix is not None:
            record_collectives(trace_prefix)
    else:
        device, backend = torch.device("cpu"), "gloo"
    # for groups that are created later without a timeout, such as DeepSpeed's
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, timeout)
    if world_size == 1:
        # no port, address or launcher needed
        store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        _join(backend, rank, world_size, timeout)
    control = None if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    return Runtime(rank, local_rank, world_size, device, control)


def record_collectives(prefix: str) -> None:
    """Makes PyTorch's flight recorder write the last NCCL collectives of this rank when one times out or fails.

    `torchfrtrace` compares the files of all ranks. Variables that are set already are kept.
    """
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED_COLLECTIVES))
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(Path(prefix).absolute()))


def _join(backend: str, rank: int, world_size: int, timeout: timedelta) -> None:
    """Raises PeerLost if the others do not arrive."""
    try:
        # None: rank 0 creates one
        store = rendezvous(connect(timeout), rank, world_size, timeout) if launcher_hosts_store() else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            used = f"MASTER_PORT={os.environ['MASTER_PORT']}: is in use on {socket.gethostname()}"
            fix = "end what listens there, such as an earlier job, or choose another"
            raise UserError(f"{used}; {fix}") from error
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise PeerLost(
            f"rank {rank} could not join the {world_size} ranks of its job at {where} within "
            f"{timeout.total_seconds():g} s: {str(error).splitlines()[0]}; see the output of the other ranks, and "
            "check that MASTER_ADDR and MASTER_PORT name a free port on the machine of rank 0"
        ) from error


def _check_environment() -> None:
    """Raises UserError unless the variables that a launcher sets for each rank are there, and numbers."""
    found = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    fix = "start the ranks with torchrun or launcher=local, or unset it to run a single process"
    for name, value in found.items():
        if value is not None and not value.isdecimal():
            raise UserError(f"{name}={value}: must be a whole number; {fix}")
    rank, world_size = env_rank(), env_world_size()
    if found["WORLD_SIZE"] is None and rank > 0:
        raise UserError(f"RANK={rank}: needs WORLD_SIZE, MASTER_ADDR and MASTER_PORT too; {fix}")
    if world_size == 1 and rank == 0:
        return
    if not rank < world_size:
        raise UserError(f"RANK={rank}: must be below WORLD_SIZE={world_size}")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE={world_size}: needs {' and '.join(missing)} too; {fix}")


def stop() -> None:
    """Leaves the job. Otherwise, a process that exits early would leave its peers waiting."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # DeepSpeed keeps groups alive, and gloo's threads may still hold tensors of the last collective. A thread
        # that frees them after interpreter shutdown aborts the process, so let them run once more
        time.sleep(DRAIN_SECONDS)
