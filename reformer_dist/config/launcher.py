"""Starting the ranks of a job: the launcher, the machines and the resources of each rank."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import Enum

from reformer_dist.config.checks import ConfigGroup, bounded, one_of, require


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
_RESOURCES = {"name", "grace", "gpus_per_node", "cpus_per_rank"}
_POD = {"nproc_per_node", "nnodes", "max_restarts", "image", "claim"} | _RESOURCES
# Keys that a launcher reads; others must have their default. launcher=local accepts the keys of a Job, which an
# experiment may set: it starts the ranks in the pod.
READ_KEYS: dict[LauncherKind, set[str]] = {
    LauncherKind.none: set(),
    LauncherKind.local: _POD,
    LauncherKind.torchrun: {"nproc_per_node", "nnodes", "hosts", "min_nodes", "max_restarts", "grace", "name"},
    LauncherKind.deepspeed: {"nproc_per_node", "nnodes", "hosts"},
    LauncherKind.slurm: {"nproc_per_node", "nnodes", "time", "sbatch", "array"} | _RESOURCES,
    LauncherKind.job: _POD,
    LauncherKind.jobset: _POD,
    LauncherKind.trainjob: _POD,
}
MOST_HOSTS = 100_000


@dataclass(kw_only=True)
class LauncherConfig(ConfigGroup, prefix="launcher."):
    """How ranks are started. Ignored by a process that is already a rank."""

    kind: LauncherKind = LauncherKind.none
    """What starts the ranks, as chosen by launcher=local, slurm and so on."""
    nproc_per_node: int | None = bounded(None, least=1, most=1024)
    """Ranks per machine; null: one for each GPU of this machine, or one."""
    nnodes: int | None = bounded(None, least=1, most=2**20)
    """Machines; null: those of launcher.hosts, or one."""
    hosts: list[str] = field(default_factory=list)
    """Host names or ranges such as "node[01-08,12]"; the first has the rendezvous. For torchrun and deepspeed."""
    min_nodes: int | None = bounded(None, least=1)
    """torchrun continues with this many machines when others are lost; null: all are needed."""
    max_restarts: int = bounded(0, least=0)
    """Restarts, each from the last checkpoint, after a rank was lost."""
    grace: int = bounded(120, least=1)
    """Seconds between SIGTERM and SIGKILL, which bounds the time for a checkpoint. Not for local and deepspeed."""
    name: str = "reformer"
    """Job name. For torchrun, SLURM and Kubernetes."""
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
            twice = [name for name, count in Counter(self.host_names).items() if count > 1]
            require(
                not twice, "launcher.hosts", self.hosts, f"must name each machine once; {twice[:1]} is repeated"
            )
        if self.kind in SINGLE_MACHINE:
            requirement = f"must be 1: launcher={self.kind.name} uses one machine"
            require(self.n_nodes == 1, "launcher.nnodes", self.nnodes, requirement)
        if self.min_nodes is not None:
            requirement = f"must be at most the {self.n_nodes} machines of the job"
            require(self.min_nodes <= self.n_nodes, "launcher.min_nodes", self.min_nodes, requirement)

    def refuse_unused_keys(self) -> None:
        """Raises ConfigError if a key is set that the launcher does not read.

        Only for the process that starts a job: ranks and readers of a saved configuration ignore launcher.*.
        """
        default = LauncherConfig()
        for key in (option.name for option in fields(self) if option.name != "kind"):
            value, is_read = getattr(self, key), key in READ_KEYS[self.kind]
            others = [kind.name for kind, keys in READ_KEYS.items() if key in keys]
            kind = f"launcher={self.kind.name} does not read it"
            reason = "this process is the only rank" if self.kind is LauncherKind.none else kind
            require(
                is_read or value == getattr(default, key),
                f"launcher.{key}",
                value,
                f"needs launcher={one_of(others)}; {reason}",
            )
        if self.kind in WITH_HOSTS and self.nnodes is not None:
            n_hosts = len(self.host_names)
            example = f'such as launcher.hosts=["node[1-{self.nnodes}]"]'
            requirement = f"must be {n_hosts}, the machines in launcher.hosts={self.hosts}; name all, {example}"
            require(self.nnodes == n_hosts, "launcher.nnodes", self.nnodes, requirement)

    @property
    def host_names(self) -> list[str]:
        """Host names of launcher.hosts, with ranges expanded. Raises ConfigError."""
        names: list[str] = []
        for host in self.hosts:
            for name in _expand(host, host):
                names.append(name)
                require(
                    len(names) <= MOST_HOSTS, "launcher.hosts", host, f"must name at most {MOST_HOSTS:,} machines"
                )
        return names

    @property
    def n_nodes(self) -> int:
        return len(self.host_names) if self.kind in WITH_HOSTS else self.nnodes or 1


def _expand(host: str, whole: str) -> Iterator[str]:
    """The names of a range such as "node[01-08,12]", as SLURM writes it: 01 to 08 have two digits."""
    before, bracket, rest = host.partition("[")
    ranges, closing, after = rest.partition("]")
    requirement = 'must be a host name, or a range such as "node[01-08,12]"'
    is_plain = re.fullmatch(r"\w[\w.:-]*" if before == whole else r"[\w.:-]*", before)
    require(bool(is_plain) and bool(bracket) == bool(closing), "launcher.hosts", whole, requirement)
    if not bracket:
        yield before
        return
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        require(match is not None, "launcher.hosts", whole, requirement)
        assert match is not None
        first, last = match[1], match[2] or match[1]
        require(int(first) <= int(last), "launcher.hosts", whole, requirement)
        for number in range(int(first), int(last) + 1):
            for end in _expand(after, whole):
                yield f"{before}{number:0{len(first)}}{end}"
