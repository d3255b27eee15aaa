"""The processes of a job: who am I, which device is mine, and how all of us agree.

Two kinds of traffic: gradients and parameters go over NCCL or gloo, by DeepSpeed; the few numbers and words by
which ranks agree go over gloo in host memory, so that they never wait for a GPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from reformer_dist.distributed.rendezvous import connect, launcher_hosts_store, meet
from reformer_dist.errors import PeerLost, UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
DRAIN = 0.1  # seconds


class SharedError(UserError):
    """An error that every rank raises alike, so that one of them may speak for all."""


class Preempted(SharedError):
    """Every rank stops alike, because the job was told to; what it had done is saved."""


@dataclass(frozen=True)
class Runtime:
    """This process among the others."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control_group: dist.ProcessGroup | None
    """gloo; None stands for the default group."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, numbers: list[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self.control_group)
        return total.tolist()

    def gather(self, thing: Any) -> list[Any]:
        """One picklable thing of each rank, on every rank."""
        things: list[Any] = [None] * self.world_size
        dist.all_gather_object(things, thing, group=self.control_group)
        return things

    def broadcast(self, thing: T | None) -> T:
        """Rank 0's picklable thing, on every rank."""
        things = [thing]
        dist.broadcast_object_list(things, src=0, group=self.control_group)
        return things[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        dist.barrier(group=self.control_group)

    def raise_together(self, error: UserError | OSError | None) -> None:
        """Every rank calls this; if any of them brings an error, all raise it."""
        said = self.gather(None if error is None else str(error))
        if any(words is not None for words in said):
            raise SharedError(_merge(said)) from error

    def together(self, action: Callable[[], T]) -> T:
        """Runs `action` on every rank; if it fails as a user's error anywhere, all ranks raise that error."""
        result: T | None = None
        error: UserError | OSError | None = None
        try:
            result = action()
        except (UserError, OSError) as caught:
            error = caught
        self.raise_together(error)
        return result  # type: ignore[return-value]

    def on_main(self, action: Callable[[], T]) -> T:
        """Runs `action` on rank 0 alone; all ranks get its result, or raise its error."""
        result: T | None = None
        words: str | None = None
        cause: UserError | OSError | None = None
        if self.is_main:
            try:
                result = action()
            except (UserError, OSError) as error:
                words, cause = str(error), error
        result, words = self.broadcast((result, words))
        if words is not None:
            raise SharedError(words) from cause
        return result  # type: ignore[return-value]


def _merge(said: list[str | None]) -> str:
    """Each different message once, with the ranks that brought it unless all did."""
    ranks: dict[str, list[int]] = {}
    for rank, words in enumerate(said):
        if words is not None:
            ranks.setdefault(words, []).append(rank)
    if len(ranks) == 1 and len(said) in (1, len(next(iter(ranks.values())))):
        return next(iter(ranks))
    return "\n".join(f"rank {', '.join(map(str, who))}: {words}" for words, who in ranks.items())


def is_rank() -> bool:
    """Whether a launcher has started this process as a rank of a job: it must start no job itself."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def env_rank() -> int:
    """This process's rank as its launcher gave it; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def env_world_size() -> int:
    """Processes of this job as its launcher gave them; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_per_node() -> int:
    """Processes of this job on this machine as its launcher gave them; all of them without one."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun's, deepspeed's
        if name in os.environ:
            return int(os.environ[name])
    return env_world_size()


def start(timeout: timedelta = TIMEOUT) -> Runtime:
    """Joins the job that torchrun, deepspeed or a like launcher made, or is a job of one process.

    timeout: how long a rank waits for the others, here and in every collective of whatever group.
    """
    world_size, rank = env_world_size(), env_rank()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    # what groups get that are made later and name none, such as DeepSpeed's
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, timeout)
    if world_size == 1:
        # needs no port, no address and no launcher
        store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        _join(backend, rank, world_size, timeout)
    control = None if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    return Runtime(rank, local_rank, world_size, device, control)


def _join(backend: str, rank: int, world_size: int, timeout: timedelta) -> None:
    """Raises PeerLost where the others do not come."""
    try:
        # None: rank 0 makes one
        store = meet(connect(timeout), rank, world_size, timeout) if launcher_hosts_store() else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise PeerLost(
            f"rank {rank} could not join the {world_size} ranks of its job at {where} within "
            f"{timeout.total_seconds():g} s: {str(error).splitlines()[0]}; see what the other ranks say, and that "
            "MASTER_ADDR and MASTER_PORT name a free port of the machine of rank 0"
        ) from error


def stop() -> None:
    """Leaves the job; without it, a process that ends early would leave its peers waiting."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # DeepSpeed keeps groups alive, and gloo's threads may still hold tensors of the last collective. One that
        # drops them after the interpreter has ended aborts the process: let them have the interpreter once more
        time.sleep(DRAIN)
