"""The run directory: created and locked by rank 0; holds the resolved configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reformer_dist.checkpoint import CheckpointReader
from reformer_dist.config import RunConfig
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import ConfigError
from reformer_dist.fs.lock import RunLock
from reformer_dist.run.compose import to_yaml
from reformer_dist.training.checkpoint_manager import find_resume_checkpoint

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class RunDirectory:
    """The locked output_dir of a run."""

    path: Path
    resume_from: CheckpointReader | None
    """None starts from scratch."""


def require_same_config(config: RunConfig, runtime: Runtime) -> None:
    """Raises ConfigError alike on every rank unless all ranks have the same configuration."""
    digests = runtime.gather(hashlib.sha256(to_yaml(config).encode()).hexdigest())
    ranks = ", ".join(str(rank) for rank, digest in enumerate(digests) if digest != digests[0])
    if ranks:
        raise ConfigError(f"ranks {ranks} have another configuration than rank 0; start all with the same")


def open_run_directory(config: RunConfig, runtime: Runtime, resources: ExitStack) -> RunDirectory:
    """Creates and locks output_dir until `resources` close, and selects the checkpoint to resume from.

    Raises alike on every rank: ConfigError if it can't be written to or another job has locked it, CheckpointError
    if resuming is impossible.
    """
    folder = Path(config.output_dir)

    def create() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            resources.callback(RunLock(folder).close)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"output_dir={folder}: can't be written to ({reason}); choose another") from error

    runtime.on_main(create)
    # under the lock: no other job can add checkpoints
    return RunDirectory(folder, find_resume_checkpoint(config, runtime))


def write_config(config: RunConfig, runtime: Runtime) -> None:
    """Writes the resolved configuration. Called once resuming has succeeded: a refused run changes nothing."""
    runtime.on_main(lambda: (Path(config.output_dir) / CONFIG_FILE).write_text(to_yaml(config)))


def config_changes(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Lines such as "optim.lr: 0.003 -> 0.001" for each difference between two saved configurations."""
    before, after = dict(_flatten(first)), dict(_flatten(second))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
