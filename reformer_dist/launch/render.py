"""The file by which something else starts the job that a command line describes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence

from reformer_dist.compose import plain, run_config_from
from reformer_dist.config import LauncherConfig, LauncherKind, RunConfig
from reformer_dist.config.checks import require
from reformer_dist.launch import manifests, scripts

FORMS: dict[LauncherKind, Callable[[LauncherConfig, Sequence[str], str], str]] = {
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
    others = [each for each in arguments if not each.lstrip("+").startswith(("launcher=", "launcher."))]
    source = f"Written by: {shlex.join(['reformer-train', *arguments])}"
    if launcher.kind is LauncherKind.slurm:
        return scripts.slurm(launcher, others, source, _trials(config))
    return FORMS[launcher.kind](launcher, others, source)


def _trials(config: RunConfig) -> list[list[str]]:
    """What each task of launcher.array adds to the command, a run directory of its own among it."""
    trials = []
    for words in config.launcher.array:
        overrides = shlex.split(words)
        run_config_from(plain(config), overrides)  # raises ConfigError for one that can't be
        name = ",".join(overrides).replace("/", "_")
        # a string in quotes is the same to Hydra and to JSON; without them Hydra would split it at the commas
        trials.append([*overrides, f"output_dir={json.dumps(f'{config.output_dir}/{name}', ensure_ascii=False)}"])
    return trials
