"""The run directory: created and locked by rank 0; holds the resolved configuration."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reformer_dist.checkpoint import CheckpointReader, RunRecord
from reformer_dist.config import OptimConfig, RunConfig
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.engine.optim import learning_rate
from reformer_dist.errors import CheckpointError, ConfigError
from reformer_dist.fs.lock import RunLock
from reformer_dist.run.compose import to_dict, to_yaml
from reformer_dist.training.checkpoint_manager import FOLDER as CHECKPOINTS
from reformer_dist.training.checkpoint_manager import find_resume_checkpoint
from reformer_dist.training.metrics_log import TENSORBOARD_FOLDER

CONFIG_FILE = "config.yaml"
RATE_TOLERANCE = 0.01  # relative change of the learning rate that is worth a warning


@dataclass(frozen=True)
class RunDirectory:
    """The locked output_dir of a run."""

    path: Path
    resume_from: CheckpointReader | None
    """None starts from scratch."""


def require_same_config(config: RunConfig, runtime: Runtime) -> None:
    """Raises ConfigError on every rank unless all ranks have the same configuration."""
    digests = runtime.gather(hashlib.sha256(to_yaml(config).encode()).hexdigest())
    ranks = ", ".join(str(rank) for rank, digest in enumerate(digests) if digest != digests[0])
    if ranks:
        raise ConfigError(f"ranks {ranks} have another configuration than rank 0; start all with the same")


def open_run_directory(config: RunConfig, runtime: Runtime, resources: ExitStack) -> RunDirectory:
    """Creates and locks output_dir until `resources` close, and selects the checkpoint to resume from.

    Raises on every rank: ConfigError if it can't be written to or another job has locked it, CheckpointError
    if resuming is impossible.
    """
    folder = Path(config.output_dir)

    def create() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            resources.callback(RunLock(folder).close)
            for each in (folder, folder / CHECKPOINTS, folder / TENSORBOARD_FOLDER):
                _check_writable(each)
        except OSError as error:
            where = error.filename or folder
            reason = f"{where} can't be written to ({error.strerror or error})"
            raise ConfigError(f"output_dir={folder}: {reason}; give it to this user or choose another") from error

    runtime.on_main(create)
    # under the lock: no other job can add checkpoints
    return RunDirectory(folder, find_resume_checkpoint(config, runtime))


def _check_writable(folder: Path) -> None:
    """Raises OSError if a directory of the run exists, but no file can be created in it."""
    if not os.path.lexists(folder):  # will be created in the run directory
        return
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def require_same_model(checkpoint: CheckpointReader, record: RunRecord) -> None:
    """Raises CheckpointError, with the keys that differ, if the model has other parameters than the checkpoint."""
    try:
        checkpoint.check_shapes(record.shapes)
    except CheckpointError as error:
        changes = config_changes({"model": checkpoint.record.config["model"]}, {"model": record.config["model"]})
        keys = "".join(f"\n  {change}" for change in changes)
        fix = "resume with the old values, or choose another output_dir"
        raise CheckpointError(f"{error}\n{fix}{':' if keys else ''}{keys}") from error


def describe_rate_change(checkpoint: CheckpointReader, config: RunConfig) -> str | None:
    """A warning if the learning rate is not the one with which the saved configuration would continue."""
    saved, step = checkpoint.record.config, checkpoint.step
    before = OptimConfig(**saved["optim"])
    last = learning_rate(before, max(0, step - 1), saved["trainer"]["max_steps"])
    expected = learning_rate(before, step, saved["trainer"]["max_steps"])
    rate = learning_rate(config.optim, step, config.trainer.max_steps)
    if step >= config.trainer.max_steps or math.isclose(rate, expected, rel_tol=RATE_TOLERANCE):
        return None
    changes = config_changes(
        {"optim": saved["optim"], "trainer.max_steps": saved["trainer"]["max_steps"]},
        {"optim": to_dict(config.optim), "trainer.max_steps": config.trainer.max_steps},
    )
    reason = f"the schedule counts from step 0, also after a change ({'; '.join(changes)})"
    return f"the learning rate goes from {last:.3g} at step {step} to {rate:.3g} at step {step + 1}: {reason}"


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
