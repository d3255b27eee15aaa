"""The file by which something else starts the job that a command line describes."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from reformer_dist.config import LauncherConfig, LauncherKind, RunConfig
from reformer_dist.config.checks import require
from reformer_dist.launch import manifests, scripts

FORMS: dict[LauncherKind, Callable[[LauncherConfig, Sequence[str], str], str]] = {
    LauncherKind.slurm: scripts.slurm,
    LauncherKind.torchrun: scripts.torchrun,
    LauncherKind.deepspeed: scripts.deepspeed,
    LauncherKind.job: manifests.job,
    LauncherKind.jobset: manifests.jobset,
    LauncherKind.trainjob: manifests.trainjob,
}


def render(config: RunConfig, arguments: Sequence[str]) -> str:
    """A script or manifest, by launcher.kind, that trains with these arguments, less those of the launcher.

    Raises ConfigError where the job would end as soon as it starts.
    """
    launcher = config.launcher
    right = "must be given: what this machine has says nothing about those that will train"
    require(launcher.nproc_per_node is not None, "launcher.nproc_per_node", "null", right)
    config.micro_batching((launcher.nproc_per_node or 1) * launcher.n_nodes)
    right = "must be 0: the trials of a sweep are shared among the tasks of an array; add --multirun"
    require(launcher.array == 0, "launcher.array", launcher.array, right)
    return FORMS[launcher.kind](launcher, _less_launcher(arguments), _source(arguments))


def render_sweep(launcher: LauncherConfig, arguments: Sequence[str]) -> str:
    """The batch script of a job array that runs `reformer-train --multirun` with these arguments.

    Raises ConfigError where launcher does not describe one.
    """
    right = "shares no sweep among machines: take launcher=slurm, or launcher=local on this one"
    require(launcher.kind is LauncherKind.slurm, "launcher", launcher.kind.name, right)
    right = "must say among how many tasks of a SLURM array the trials are shared"
    require(launcher.array > 0, "launcher.array", launcher.array, right)
    right = "must be 1: each trial has one machine"
    require(launcher.nnodes == 1, "launcher.nnodes", launcher.nnodes, right)
    return scripts.slurm_sweep(launcher, _less_launcher(arguments), _source(arguments))


def _less_launcher(arguments: Sequence[str]) -> list[str]:
    return [each for each in arguments if not each.lstrip("+").startswith(("launcher=", "launcher."))]


def _source(arguments: Sequence[str]) -> str:
    return f"Written by: {shlex.join(['reformer-train', *arguments])}"
