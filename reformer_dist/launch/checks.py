"""Checks of launcher.*: values that would break a printed script, or that SLURM or Kubernetes would refuse."""

from __future__ import annotations

import re

from reformer_dist.config import LauncherConfig, LauncherKind
from reformer_dist.config.checks import require
from reformer_dist.process.signals import SIGNALS

KUBERNETES = (LauncherKind.job, LauncherKind.jobset, LauncherKind.trainjob)
DNS_LABEL = r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?"  # with room for the suffixes of pods: at most 63 in all
DNS_NAME = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
# options of sbatch that a key sets, in both spellings
OWNERS = {
    "--job-name": "name",
    "-J": "name",
    "--nodes": "nnodes",
    "-N": "nnodes",
    "--ntasks-per-node": "nproc_per_node",
    "--ntasks": "nproc_per_node",
    "-n": "nproc_per_node",
    "--cpus-per-task": "cpus_per_rank",
    "-c": "cpus_per_rank",
    "--gpus-per-node": "gpus_per_node",
    "--time": "time",
    "-t": "time",
    "--array": "array",
    "-a": "array",
}
SIGNAL_NAMES = {word for each in SIGNALS for word in (each.name, each.name.removeprefix("SIG"), str(each.value))}


def check(launcher: LauncherConfig) -> None:
    """Raises ConfigError."""
    launcher.refuse_unused_keys()
    if launcher.kind in KUBERNETES:
        requirement = 'must be lower-case letters, digits and "-", at most 52, for Kubernetes'
        _match(launcher, "name", DNS_LABEL, requirement)
        _match(launcher, "image", r"[\w.:/@-]+", "must be a container image, such as registry/name:tag")
        _match(launcher, "claim", DNS_NAME, "must be the name of a persistent volume claim")
    else:
        _match(launcher, "name", r"\w[\w.-]*", 'must be letters, digits, "_", "." and "-"')
    if launcher.kind is LauncherKind.slurm:
        _match(
            launcher, "time", r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", "must be as sbatch takes it, such as 24:00:00"
        )
        for option in launcher.sbatch:
            _check_option(option)


def _match(launcher: LauncherConfig, key: str, pattern: str, requirement: str) -> None:
    value = getattr(launcher, key)
    require(re.fullmatch(pattern, value, re.ASCII) is not None, f"launcher.{key}", repr(value), requirement)


def _check_option(option: str) -> None:
    key = "launcher.sbatch"
    is_line = re.fullmatch(r"(-[A-Za-z]|--[a-z][a-z-]*)([ =]?[^\n\r]*)", option)
    require(is_line is not None, key, repr(option), "must be an option of sbatch, such as --partition=gpu")
    assert is_line is not None
    owner = OWNERS.get(is_line[1])
    require(owner is None, key, option, f"is set by launcher.{owner}")
    if is_line[1] == "--signal":
        match = re.fullmatch(r"(?:R:)?(\w+)(?:@\d+)?", is_line[2].lstrip(" ="))
        requirement = (
            "must be a signal at which ranks save, such as --signal=USR1@120; B: would reach only the shell"
        )
        require(match is not None and match[1].upper() in SIGNAL_NAMES, key, option, requirement)
