"""The run directory: created and locked by rank 0; holds the resolved configuration."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from reformer_dist.checkpoint import CheckpointReader, RunRecord
from reformer_dist.config import OptimConfig, RunConfig
from reformer_dist.config.optim import OPEN_ENDED
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.engine.schedule import learning_rate
from reformer_dist.errors import CheckpointError, ConfigError
from reformer_dist.fs.lock import RunLock
from reformer_dist.run.compose import to_dict, to_yaml
from reformer_dist.run.config_changes import config_changes
from reformer_dist.training.checkpoint_manager import FOLDER as CHECKPOINTS
from reformer_dist.training.checkpoint_manager import find_resume_checkpoint
from reformer_dist.training.metrics_log import TENSORBOARD_FOLDER

CONFIG_FILE = "config.yaml"
RATE_TOLERANCE = 0.01  # relative change of the learning rate that is worth a message
RATE_KEYS = ("lr", "schedule", "warmup_steps", "min_lr_ratio", "restarts")  # who changes these wants another rate


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


def check_rate(checkpoint: CheckpointReader, config: RunConfig) -> str | None:
    """A warning if the learning rate is not the one with which the saved configuration would continue.

    Raises ConfigError if it rises, or falls in the middle of a decay from optim.decay_from, only because the
    schedule ends elsewhere, unless optim.accept_jump allows that.
    """
    saved, step = checkpoint.record.config, checkpoint.step
    before, old_end, end = OptimConfig(**saved["optim"]), saved["trainer"]["max_steps"], config.trainer.max_steps
    last = learning_rate(before, max(0, step - 1), old_end)
    expected, rate = learning_rate(before, step, old_end), learning_rate(config.optim, step, end)
    if step >= end or any(math.isclose(rate, each, rel_tol=RATE_TOLERANCE) for each in (expected, last)):
        return None
    jump = f"the learning rate goes from {last:.3g} at step {step} to {rate:.3g} at step {step + 1}"
    changes = config_changes(
        {"optim": saved["optim"], "trainer.max_steps": old_end},
        {"optim": to_dict(config.optim), "trainer.max_steps": end},
    )
    reason = f"the schedule counts from step 0, also after a change ({'; '.join(changes)})"
    is_asked = any(getattr(before, key) != getattr(config.optim, key) for key in RATE_KEYS)
    is_harmless = rate < last and config.optim.decay_from is None  # the schedule goes on
    if is_asked or is_harmless or config.optim.accept_jump:
        return f"{jump}: {reason}"
    fixes = _rate_fixes(checkpoint, config, last)
    raise ConfigError(f"trainer.max_steps={end}: {jump}: {reason}; {'; '.join(fixes)}")


def _rate_fixes(checkpoint: CheckpointReader, config: RunConfig, last: float) -> list[str]:
    """Ways to continue at the rate of a checkpoint, and to accept another one."""
    step, optim = checkpoint.step, config.optim
    constant = f"optim.schedule=constant optim.lr={last:.6g} optim.warmup_steps=0"
    if optim.decay_from is not None:
        constant += " optim.decay_from=null"
    fixes = [f"to stay at the last rate: {constant}{' optim.restarts=[]' if optim.restarts else ''}"]
    if optim.schedule not in OPEN_ENDED and step == checkpoint.record.config["trainer"]["max_steps"]:
        restarts = ",".join(map(str, [*(each for each in optim.restarts if each < step), step]))
        fixes.append(f"to warm up again after the end of the schedule: optim.restarts=[{restarts}]")
    if optim.decay_from is not None and optim.decay_from < step:
        branch = "resume=<a checkpoint from before the decay> and another output_dir"
        fixes.append(f"to train longer before the decay: {branch}")
    return [*fixes, "to go on with the jump: optim.accept_jump=true"]


def write_config(config: RunConfig, runtime: Runtime) -> None:
    """Writes the resolved configuration. Called once resuming has succeeded: a refused run changes nothing."""
    runtime.on_main(lambda: (Path(config.output_dir) / CONFIG_FILE).write_text(to_yaml(config)))
