"""Who starts the processes of a job, where, and how many."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from reformer_dist.config.checks import at_least, require


class LauncherKind(Enum):
    none = "none"
    """This process is the only rank, or one of those that something else has started."""
    local = "local"
    """This process starts the ranks on this machine, and ends as they end."""
    torchrun = "torchrun"
    """Prints the script that each of launcher.hosts runs."""
    deepspeed = "deepspeed"
    """Prints the script that the first of launcher.hosts runs; it reaches the others over ssh."""
    slurm = "slurm"
    """Prints a batch script."""
    job = "job"
    """Prints a Kubernetes Job of one machine."""
    jobset = "jobset"
    """Prints a Kubernetes JobSet."""
    trainjob = "trainjob"
    """Prints a TrainJob of Kubeflow Trainer."""


BY_HOSTS = (LauncherKind.torchrun, LauncherKind.deepspeed)
ON_ONE_MACHINE = (LauncherKind.local, LauncherKind.job)


@dataclass(kw_only=True)
class LauncherConfig:
    """How ranks are started; a process that is a rank already does not look at it."""

    kind: LauncherKind = LauncherKind.none
    nproc_per_node: int | None = None
    """Ranks on each machine; null: one for each GPU of this machine, or one."""
    nnodes: int = 1
    """Machines; those of torchrun and deepspeed are counted in launcher.hosts."""
    hosts: list[str] = field(default_factory=list)
    """Machines by name; the first is where all ranks meet. For torchrun and deepspeed."""
    min_nodes: int | None = None
    """Machines with which torchrun goes on when others are lost; null: all."""
    max_restarts: int = 0
    """How often the ranks are started again, to go on from the last checkpoint, after one of them was lost."""
    grace: int = 120
    """Seconds from SIGTERM to the end: what a checkpoint may take. For SLURM and Kubernetes."""
    name: str = "reformer"
    """Of the job. For SLURM and Kubernetes."""
    gpus_per_node: int | None = None
    """GPUs asked for on each machine; null: one for each rank. For SLURM and Kubernetes."""
    cpus_per_rank: int = 8
    """Cores for each rank. For SLURM and Kubernetes."""
    time: str = "24:00:00"
    """Longest time of a SLURM job, after which it is requeued."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, such as "--partition=gpu"."""
    array: int = 0
    """Tasks of a SLURM job array among which the trials of a sweep are shared; 0: no array."""
    image: str = ""
    """Container image that has reformer_dist. For Kubernetes."""
    claim: str = ""
    """Persistent volume claim, for data and runs, mounted as the working directory. For Kubernetes."""

    def __post_init__(self) -> None:
        at_least(1, launcher__nproc_per_node=self.nproc_per_node, launcher__nnodes=self.nnodes)
        at_least(1, launcher__cpus_per_rank=self.cpus_per_rank, launcher__grace=self.grace)
        at_least(0, launcher__max_restarts=self.max_restarts, launcher__gpus_per_node=self.gpus_per_node)
        at_least(0, launcher__array=self.array)
        if self.kind in BY_HOSTS:
            require(bool(self.hosts), "launcher.hosts", "[]", "must name the machines, such as [node1,node2]")
        if self.kind in ON_ONE_MACHINE:
            right = f"must be 1: launcher={self.kind.name} uses one machine"
            require(self.nnodes == 1, "launcher.nnodes", self.nnodes, right)
        if self.min_nodes is not None:
            at_least(1, launcher__min_nodes=self.min_nodes)
            right = f"must be at most the {self.n_nodes} machines of the job"
            require(self.min_nodes <= self.n_nodes, "launcher.min_nodes", self.min_nodes, right)

    def require_read(self) -> None:
        """Raises ConfigError where a key is set that nothing reads, since no launcher is chosen.

        For who is about to start a job: ranks, and readers of a saved configuration, look at no launcher's keys.
        """
        if self.kind is LauncherKind.none:
            kinds = [kind.name for kind in LauncherKind if kind is not LauncherKind.none]
            right = f"needs launcher={kinds[0]} (or {', '.join(kinds[1:])}); this process alone is the job"
            for key, value in vars(LauncherConfig()).items():
                require(getattr(self, key) == value, f"launcher.{key}", getattr(self, key), right)

    @property
    def n_nodes(self) -> int:
        return len(self.hosts) if self.kind in BY_HOSTS else self.nnodes
