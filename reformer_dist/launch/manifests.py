"""Kubernetes manifests that start a job: Job, JobSet, and the TrainJob of Kubeflow Trainer (v2.2 or newer)."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]

from reformer_dist.config import LauncherConfig
from reformer_dist.launch.scripts import MODULE, torchrun_options
from reformer_dist.process.exit_status import PREEMPTED

Tree = dict[str, Any]
FOLDER = "/workspace"  # mount point of the claim
# ignored: not counted as a failure, and the pod is replaced
EVICTED = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
SAVED = {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [PREEMPTED]}}


def job(launcher: LauncherConfig, arguments: Sequence[str], source: str) -> str:
    """A Job of one pod, in which reformer-train starts the ranks."""
    local = ["launcher=local", f"launcher.nproc_per_node={launcher.nproc_per_node}"]
    pod = _pod(launcher, ["reformer-train", *local, *arguments], [])
    spec = {
        "backoffLimit": launcher.max_restarts,
        "podFailurePolicy": {"rules": [EVICTED, SAVED]},
        "template": {"spec": pod},
    }
    return _manifest("batch/v1", "Job", launcher, spec, source)


def jobset(launcher: LauncherConfig, arguments: Sequence[str], source: str) -> str:
    """A JobSet of one pod per machine, each running torchrun; the rendezvous is in the first."""
    rendezvous_host = f"{launcher.name}-node-0-0.{launcher.name}"
    options = torchrun_options(launcher, str(launcher.n_nodes), rendezvous_host)
    pod = _pod(launcher, ["torchrun", *options, "-m", MODULE, *arguments], _shutdown_timeout(launcher))
    pods = {
        "parallelism": launcher.n_nodes,
        "completions": launcher.n_nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [EVICTED]},
        "template": {"spec": pod},
    }
    spec = {
        "failurePolicy": {"maxRestarts": launcher.max_restarts},
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": pods}}],
    }
    return _manifest("jobset.x-k8s.io/v1alpha2", "JobSet", launcher, spec, source)


def trainjob(launcher: LauncherConfig, arguments: Sequence[str], source: str) -> str:
    """A TrainJob of the runtime torch-distributed, which configures torchrun, patched to mount the claim."""
    torchrun = ["torchrun", f"--max-restarts={launcher.max_restarts}", "-m", MODULE, *arguments]
    pod = {
        "terminationGracePeriodSeconds": launcher.grace,
        "containers": [{"name": "node", "volumeMounts": _mounts()}],
        "volumes": _volumes(launcher),
    }
    replicated_job = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    patch = {
        "manager": "reformer.dist/launch",
        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated_job]}}},
    }
    group = "trainer.kubeflow.org"
    spec = {
        "runtimeRef": {"apiGroup": group, "kind": "ClusterTrainingRuntime", "name": "torch-distributed"},
        "trainer": {
            "image": launcher.image,
            "numNodes": launcher.n_nodes,
            "numProcPerNode": launcher.nproc_per_node,
            "command": ["bash", "-c", f"cd {FOLDER} && exec {shlex.join(torchrun)}"],
            "env": [_threads(launcher), *_shutdown_timeout(launcher)],
            "resourcesPerNode": _resources(launcher),
        },
        "runtimePatches": [patch],
    }
    return _manifest(f"{group}/v1alpha1", "TrainJob", launcher, spec, source)


def _pod(launcher: LauncherConfig, command: list[str], environment: list[Tree]) -> Tree:
    container = {
        "name": "node",
        "image": launcher.image,
        "workingDir": FOLDER,
        "command": command,
        "env": [_threads(launcher), *environment],
        "resources": _resources(launcher),
        "volumeMounts": _mounts(),
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": launcher.grace,
        "containers": [container],
        "volumes": _volumes(launcher),
    }


def _threads(launcher: LauncherConfig) -> Tree:
    return {"name": "OMP_NUM_THREADS", "value": str(launcher.cpus_per_rank)}


def _shutdown_timeout(launcher: LauncherConfig) -> list[Tree]:
    """Seconds that torchrun waits for ranks to save after SIGTERM."""
    return [{"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(launcher.grace)}]


def _resources(launcher: LauncherConfig) -> Tree:
    ranks = launcher.nproc_per_node or 1
    gpus = ranks if launcher.gpus_per_node is None else launcher.gpus_per_node
    resources: Tree = {"requests": {"cpu": str(ranks * launcher.cpus_per_rank)}}
    if gpus:
        resources["limits"] = {"nvidia.com/gpu": str(gpus)}
    return resources


def _mounts() -> list[Tree]:
    # NCCL needs /dev/shm between the GPUs of a machine, and its default size is 64 MiB
    return [{"name": "work", "mountPath": FOLDER}, {"name": "shm", "mountPath": "/dev/shm"}]


def _volumes(launcher: LauncherConfig) -> list[Tree]:
    return [
        {"name": "work", "persistentVolumeClaim": {"claimName": launcher.claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]


def _manifest(api_version: str, kind: str, launcher: LauncherConfig, spec: Tree, source: str) -> str:
    manifest = {"apiVersion": api_version, "kind": kind, "metadata": {"name": launcher.name}, "spec": spec}
    return f"# {source}\n" + yaml.dump(manifest, Dumper=_PlainDumper, sort_keys=False, width=110)


class _PlainDumper(yaml.SafeDumper):
    """Writes repeated values out, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
