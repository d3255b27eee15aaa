"""Scripts and manifests that start the job of a command line elsewhere."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from reformer_dist.config import LauncherConfig, LauncherKind, RunConfig
from reformer_dist.config.checks import require
from reformer_dist.launch import checks, manifests, scripts

RENDERERS: dict[LauncherKind, Callable[[LauncherConfig, Sequence[str], str], str]] = {
    LauncherKind.slurm: scripts.slurm,
    LauncherKind.torchrun: scripts.torchrun,
    LauncherKind.deepspeed: scripts.deepspeed,
    LauncherKind.job: manifests.job,
    LauncherKind.jobset: manifests.jobset,
    LauncherKind.trainjob: manifests.trainjob,
}


def render(config: RunConfig, arguments: Sequence[str]) -> str:
    """The script or manifest of launcher.kind that trains with these arguments, without launcher.*.

    Raises ConfigError if the job would fail as soon as it starts.
    """
    launcher = config.launcher
    requirement = "must be set: the machines of the job may have other GPUs than this one"
    require(launcher.nproc_per_node is not None, "launcher.nproc_per_node", "null", requirement)
    config.micro_batching((launcher.nproc_per_node or 1) * launcher.n_nodes)
    requirement = "must be 0: an array is for the trials of a sweep; add --multirun"
    require(launcher.array == 0, "launcher.array", launcher.array, requirement)
    checks.check(launcher)
    return RENDERERS[launcher.kind](launcher, _without_launcher(arguments), _header(arguments))


def render_sweep(launcher: LauncherConfig, arguments: Sequence[str]) -> str:
    """The batch script of a job array that runs `reformer-train --multirun` with these arguments.

    Raises ConfigError if `launcher` does not describe a job array.
    """
    requirement = "can't distribute a sweep: use launcher=slurm, or launcher=local on this machine"
    require(launcher.kind is LauncherKind.slurm, "launcher", launcher.kind.name, requirement)
    requirement = "must be the number of tasks of the SLURM array that runs the trials"
    require(launcher.array > 0, "launcher.array", launcher.array, requirement)
    requirement = "must be 1: each trial runs on one machine"
    require(launcher.n_nodes == 1, "launcher.nnodes", launcher.nnodes, requirement)
    checks.check(launcher)
    return scripts.slurm_sweep(launcher, _without_launcher(arguments), _header(arguments))


def _without_launcher(arguments: Sequence[str]) -> list[str]:
    return [word for word in arguments if not word.lstrip("+").startswith(("launcher=", "launcher."))]


def _header(arguments: Sequence[str]) -> str:
    # a comment of one line
    command = shlex.join(["reformer-train", *arguments])
    return "Written by: " + "".join(each if each.isprintable() else repr(each)[1:-1] for each in command)
