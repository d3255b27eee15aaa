"""Who starts the processes of a job, and how many."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from reformer_dist.config.checks import at_least


class LauncherKind(Enum):
    none = "none"
    """This process is the only rank, or one of those that torchrun, deepspeed or SLURM has started."""
    local = "local"
    """This process starts the ranks on this machine, and ends as they end."""


@dataclass(kw_only=True)
class LauncherConfig:
    """How ranks are started; a process that is a rank already does not look at it."""

    kind: LauncherKind = LauncherKind.none
    nproc_per_node: int | None = None
    """Ranks on each machine; null: one for each GPU of this machine, or one."""
    max_restarts: int = 0
    """How often the ranks are started again, to go on from the last checkpoint, after one of them was killed."""

    def __post_init__(self) -> None:
        at_least(1, launcher__nproc_per_node=self.nproc_per_node)
        at_least(0, launcher__max_restarts=self.max_restarts)
