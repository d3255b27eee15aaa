"""Starting the ranks of a job: the launcher, the machines and the resources of each rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from reformer_dist.config.checks import ConfigGroup, bounded, require


class LauncherKind(Enum):
    none = "none"
    """This process is the only rank, or one that an external launcher has started."""
    local = "local"
    """This process starts the ranks on this machine and waits for them."""
    torchrun = "torchrun"
    """Prints a script to run on each of launcher.hosts."""
    deepspeed = "deepspeed"
    """Prints a script to run on the first of launcher.hosts; it reaches the others over ssh."""
    slurm = "slurm"
    """Prints a batch script."""
    job = "job"
    """Prints a Kubernetes Job for a single machine."""
    jobset = "jobset"
    """Prints a Kubernetes JobSet."""
    trainjob = "trainjob"
    """Prints a TrainJob of Kubeflow Trainer."""


WITH_HOSTS = (LauncherKind.torchrun, LauncherKind.deepspeed)
SINGLE_MACHINE = (LauncherKind.local, LauncherKind.job)


@dataclass(kw_only=True)
class LauncherConfig(ConfigGroup, prefix="launcher."):
    """How ranks are started. Ignored by a process that is already a rank."""

    kind: LauncherKind = LauncherKind.none
    nproc_per_node: int | None = bounded(None, least=1)
    """Ranks per machine; null: one for each GPU of this machine, or one."""
    nnodes: int = bounded(1, least=1)
    """Machines; torchrun and deepspeed count launcher.hosts instead."""
    hosts: list[str] = field(default_factory=list)
    """Host names; the rendezvous is on the first. For torchrun and deepspeed."""
    min_nodes: int | None = bounded(None, least=1)
    """torchrun continues with this many machines when others are lost; null: all are needed."""
    max_restarts: int = bounded(0, least=0)
    """Restarts, each from the last checkpoint, after a rank was lost."""
    grace: int = bounded(120, least=1)
    """Seconds between SIGTERM and SIGKILL, which bounds the time for a checkpoint. For SLURM and Kubernetes."""
    name: str = "reformer"
    """Job name. For SLURM and Kubernetes."""
    gpus_per_node: int | None = bounded(None, least=0)
    """GPUs requested per machine; null: one per rank. For SLURM and Kubernetes."""
    cpus_per_rank: int = bounded(8, least=1)
    """Cores per rank. For SLURM and Kubernetes."""
    time: str = "24:00:00"
    """Time limit of a SLURM job, after which it is requeued."""
    sbatch: list[str] = field(default_factory=list)
    """Additional options of sbatch, such as "--partition=gpu"."""
    array: int = bounded(0, least=0)
    """Tasks of a SLURM job array that share the trials of a sweep; 0: no array."""
    image: str = ""
    """Container image with reformer_dist installed. For Kubernetes."""
    claim: str = ""
    """Persistent volume claim for data and runs, mounted as the working directory. For Kubernetes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind in WITH_HOSTS:
            require(bool(self.hosts), "launcher.hosts", "[]", "must name the machines, such as [node1,node2]")
        if self.kind in SINGLE_MACHINE:
            requirement = f"must be 1: launcher={self.kind.name} uses one machine"
            require(self.nnodes == 1, "launcher.nnodes", self.nnodes, requirement)
        if self.min_nodes is not None:
            requirement = f"must be at most the {self.n_nodes} machines of the job"
            require(self.min_nodes <= self.n_nodes, "launcher.min_nodes", self.min_nodes, requirement)

    def refuse_unused_keys(self) -> None:
        """Raises ConfigError if keys are set, but no launcher that would read them.

        Only for the process that starts a job: ranks and readers of a saved configuration ignore launcher.*.
        """
        if self.kind is LauncherKind.none:
            kinds = [kind.name for kind in LauncherKind if kind is not LauncherKind.none]
            requirement = f"needs launcher={kinds[0]} (or {', '.join(kinds[1:])}); this process is the only rank"
            for key, value in vars(LauncherConfig()).items():
                require(getattr(self, key) == value, f"launcher.{key}", getattr(self, key), requirement)

    @property
    def n_nodes(self) -> int:
        return len(self.hosts) if self.kind in WITH_HOSTS else self.nnodes
