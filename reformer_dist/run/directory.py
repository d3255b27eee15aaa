"""The run directory: the same for every rank, made by rank 0, with the resolved configuration in it."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from reformer_dist.config import RunConfig
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import ConfigError
from reformer_dist.fs.lock import RunLock
from reformer_dist.run.compose import plain, to_yaml

CONFIG_FILE = "config.yaml"


def require_same_config(config: RunConfig, runtime: Runtime) -> None:
    """Raises ConfigError alike on every rank unless all ranks were given the same configuration."""
    digests = runtime.gather(hashlib.sha256(to_yaml(config).encode()).hexdigest())
    odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if odd:
        who = ", ".join(map(str, odd))
        raise ConfigError(f"ranks {who} were given another configuration than rank 0; start all with the same")


def open_run_directory(config: RunConfig, runtime: Runtime, resources: ExitStack) -> Path:
    """Makes output_dir and keeps other jobs out of it for as long as `resources` are open.

    Raises an error that every rank shares where it can't be written to, or another job is in it.
    """
    folder = Path(config.output_dir)

    def make() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            resources.callback(RunLock(folder).close)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"output_dir={folder}: can't be written to ({reason}); choose another") from error

    runtime.on_main(make)
    return folder


def write_config(config: RunConfig, runtime: Runtime) -> None:
    """Writes the resolved configuration, once it is known that this run may use the directory."""
    runtime.on_main(lambda: (Path(config.output_dir) / CONFIG_FILE).write_text(to_yaml(config)))


def changed_keys(saved: dict[str, Any], config: RunConfig) -> list[str]:
    """Lines such as "optim.lr: 0.003 -> 0.001" for what differs from a saved configuration."""
    return changed_values(saved, plain(config))


def changed_values(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """The same of two saved configurations."""
    before, now = dict(_flat(first)), dict(_flat(second))
    return [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves.extend(_flat(value, f"{prefix}{key}."))
        else:
            leaves.append((f"{prefix}{key}", value))
    return leaves
