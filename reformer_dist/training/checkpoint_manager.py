"""A run's checkpoints: which one to go on from, and how to save the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from reformer_dist.checkpoint import CheckpointReader, AsyncSave, find_checkpoint, prune, resolve_checkpoint
from reformer_dist.config import RunConfig
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.engine import TrainEngine
from reformer_dist.errors import CheckpointError
from reformer_dist.process.log import logger
from reformer_dist.training.trainer import TrainState

FOLDER = "checkpoints"
PROGRESS = ("step", "skipped", "skipped_in_a_row", "seconds", "is_observed")  # alike on all ranks


def find_resume_checkpoint(config: RunConfig, runtime: Runtime) -> CheckpointReader | None:
    """The checkpoint that `resume` asks for, None to start from nothing; the same on every rank.

    Raises CheckpointError where going on is impossible, or starting anew would mix two runs.
    """
    path = runtime.on_main(lambda: _choose(config))
    return CheckpointReader(path) if path is not None else None


def _choose(config: RunConfig) -> Path | None:
    root = Path(config.output_dir) / FOLDER
    found, complaints = find_checkpoint(root)
    for words in complaints:
        logger.warning(f"passed over {words}")
    if config.resume not in ("auto", "never"):
        return _from_path(config.resume, found)
    if config.resume == "never" and (found is not None or complaints):
        fix = "choose another output_dir, or move them away"
        raise CheckpointError(f"resume=never: {root} holds checkpoints of an earlier run; {fix}")
    if found is None and complaints:
        fix = "move the damaged ones away to start anew, or name another by resume=<path>"
        raise CheckpointError(f"{root}: no checkpoint is whole; {fix}")
    return found


def _from_path(given: str, found: Path | None) -> Path:
    """Where a run that begins at a given checkpoint stands: there, or, once it has saved, at its own newest one.

    So the same command goes on however often the run is cut.
    """
    if found is not None and CheckpointReader(found).run["config"]["resume"] == given:
        return found
    start = resolve_checkpoint(Path(given))
    if found is not None and found.resolve() != start.resolve():
        fix = "give another output_dir, or resume=auto to go on from it"
        raise CheckpointError(f"resume={given}: {found} is of a run that did not begin there; {fix}")
    return start


class CheckpointManager:
    """Saves and restores one run."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        engine: TrainEngine,
        *,
        description: dict[str, Any],
        extra_files: dict[str, bytes],
    ) -> None:
        """description: what evaluation and generation need to know of the run, as JSON values."""
        self._runtime, self._engine = runtime, engine
        self._root = Path(config.output_dir) / FOLDER
        self._keep, self._keep_every = config.trainer.keep_checkpoints, config.trainer.keep_every
        self._saving: AsyncSave | None = None
        self._copies: dict[str, Tensor] = {}
        self._description, self._extra_files = description, extra_files

    def begin(self, progress: TrainState, data_state: dict[str, Any]) -> None:
        """Copies the state of the step just done, and lets a thread write it.

        The save before it must be settled. Raises UserError alike on every rank, as `wait` does.
        """
        assert self._saving is None
        run = {
            **self._description,
            "progress": {name: getattr(progress, name) for name in PROGRESS},
            "loss_scaler": self._engine.scaler_state(),
        }
        self._saving = AsyncSave(
            self._runtime,
            self._root,
            progress.step,
            self._engine.fragments(),
            rank_state={"data": data_state, "window": progress.window},
            run=run,
            extra_files=self._extra_files,
            copies=self._copies,
        )

    def wait(self, *, wait: bool) -> int | None:
        """The step whose checkpoint is whole since this call, if any; waits for it if asked to."""
        saving = self._saving
        if saving is None or not (wait or saving.is_done):
            return None
        self._saving = None
        folder = saving.finish()
        logger.info(f"saved {folder}")
        if self._runtime.is_main:
            prune(self._root, folder, self._keep, self._keep_every)
        return saving.step

    def restore(self, reader: CheckpointReader) -> TrainState:
        """Fills the engine; returns how far the run was."""
        self._runtime.together(lambda: reader.check_shapes(self._description["shapes"]))
        self._runtime.together(lambda: self._engine.load_fragments(reader))
        self._engine.load_scaler_state(reader.run["loss_scaler"])
        saved = {name: value for name, value in reader.run["progress"].items() if name in PROGRESS}
        return TrainState(**saved, window=self._window(reader))

    def _window(self, reader: CheckpointReader) -> dict[str, float]:
        """This rank's share of the window in which the run was cut; in another world, rank 0 takes all of it."""
        windows = [state.get("window", {}) for state in reader.rank_states]
        rank = self._runtime.rank
        if len(windows) == self._runtime.world_size:
            return windows[rank]
        total = sum(window.get("loss", 0.0) for window in windows)
        return windows[0] and {**windows[0], "loss": total if rank == 0 else 0.0}
