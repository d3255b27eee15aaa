"""CheckpointManager: chooses the checkpoint to resume from, saves in the background, restores."""

from __future__ import annotations

from copy import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from reformer_dist.checkpoint import (
    AsyncSave,
    CheckpointReader,
    RunRecord,
    checkpoint_problem,
    find_checkpoint,
    prune,
    resolve_checkpoint,
)
from reformer_dist.checkpoint.files import step_folders, step_of
from reformer_dist.config import RunConfig
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.engine import TrainEngine
from reformer_dist.errors import CheckpointError
from reformer_dist.process.log import logger

FOLDER = "checkpoints"
# equal on all ranks; not skipped_in_a_row: each start of a run may skip as many
SHARED_FIELDS = (
    *("step", "skipped", "spikes", "running", "seconds", "is_observed", "is_worse_than_guessing"),
    *("best", "evaluations_since_best", "judged_step"),
)


class BestValue(TypedDict):
    """The best value of a metric, and the step after which it was measured."""

    metric: str
    value: float
    step: int


@dataclass
class TrainState:
    """Progress of a run, saved in checkpoints besides weights and data position."""

    step: int = 0
    """Optimizer steps done, including skipped ones."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    spikes: int = 0
    running: dict[str, list[float]] = field(default_factory=dict)
    """Mean, variance and number of the values with which the next step is compared, by name."""
    seconds: float = 0.0
    """Training time, without evaluation, samples and checkpoints."""
    is_observed: bool = True
    """False if the evaluation or text sample of the step was interrupted and must be repeated."""
    is_worse_than_guessing: bool = False
    """Whether the loss last logged after the warm-up was above that of a uniform guess."""
    best: BestValue | None = None
    """Of trainer.keep_best."""
    evaluations_since_best: int = 0
    judged_step: int = -1
    """Step of the last evaluation that was compared with the best."""
    window: dict[str, float] = field(default_factory=dict)
    """This rank's metrics since they were last logged, if the run stopped in between."""


def find_resume_checkpoint(config: RunConfig, runtime: Runtime) -> CheckpointReader | None:
    """The checkpoint that `resume` selects, None to start from scratch; the same on every rank.

    Raises CheckpointError if resuming is impossible, or if starting from scratch would mix two runs.
    """
    path = runtime.on_main(lambda: _select(config))
    return CheckpointReader(path) if path is not None else None


def has_checkpoints(config: RunConfig) -> bool:
    """Whether the run has begun: its output_dir holds checkpoints, intact or not."""
    return bool(step_folders(Path(config.output_dir) / FOLDER))


def _select(config: RunConfig) -> Path | None:
    root = Path(config.output_dir) / FOLDER
    newest, problems = find_checkpoint(root)
    for problem in problems:
        logger.warning(f"skipped damaged checkpoint {problem}")
    if config.resume not in ("auto", "never"):
        return _select_path(config.resume, newest)
    if config.resume == "never" and (newest is not None or problems):
        fix = "choose another output_dir, or move them away"
        raise CheckpointError(f"resume=never: {root} holds checkpoints of an earlier run; {fix}")
    if newest is None and problems:
        fix = "move the damaged ones away to start from scratch, or name another by resume=<path>"
        raise CheckpointError(f"{root}: no checkpoint is intact; {fix}")
    return newest


def _select_path(resume: str, newest: Path | None) -> Path:
    """The checkpoint at the path `resume`, or the newest one of the run if it began at that path.

    So the same command resumes the run after each interruption.
    """
    if newest is not None and CheckpointReader(newest).record.config["resume"] == resume:
        return newest
    selected = resolve_checkpoint(Path(resume))
    if newest is not None and newest.resolve() != selected.resolve():
        fix = "choose another output_dir, or resume=auto to resume from it"
        raise CheckpointError(f"resume={resume}: {newest} is of a run that did not begin there; {fix}")
    return selected


class CheckpointManager:
    """Saves and restores one run."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        engine: TrainEngine,
        *,
        record: RunRecord,
        extra_files: dict[str, bytes],
    ) -> None:
        """record: its progress and loss scaler are set by each save."""
        self._runtime, self._engine = runtime, engine
        self._root = Path(config.output_dir) / FOLDER
        self._keep, self._keep_every = config.trainer.keep_checkpoints, config.trainer.keep_every
        self._pending: AsyncSave | None = None
        self._buffers: dict[str, Tensor] = {}
        self._record, self._extra_files = record, extra_files
        self.last_saved: Path | None = None
        """The checkpoint from which the run would resume."""
        self._origin: CheckpointReader | None = None  # from which this process resumed
        self._unpruned: Path | None = None  # the newest checkpoint, until older ones have made room for it
        self._newest_step = self._proven_step = self._good_step = -1
        # never removed; the next one once the save that knows of it is on disk
        self._best_step: int | None = None
        self._next_best_step: int | None = None

    def start_save(self, state: TrainState, data_state: dict[str, Any]) -> None:
        """Copies the state after the step just done, and starts a thread that writes it.

        The previous save must have been waited for. Raises UserError on every rank, as `wait` does, and
        NonFiniteError unless all weights and moments are finite.
        """
        assert self._pending is None
        record = replace(
            self._record,
            progress={name: copy(getattr(state, name)) for name in SHARED_FIELDS},
            loss_scaler=self._engine.scaler_state(),
            average=None if self._engine.average is None else asdict(self._engine.average),
        )
        self._newest_step = state.step
        self._next_best_step = state.best["step"] if state.best is not None else None
        self._pending = AsyncSave(
            self._runtime,
            self._root,
            state.step,
            self._engine.fragments(),
            rank_state={"data": data_state, "window": state.window},
            record=record,
            extra_files=self._extra_files,
            buffers=self._buffers,
        )

    def wait(self, *, block: bool = True) -> int | None:
        """Finalizes the pending save once its threads have ended; returns its step, or None if there is none yet.

        block: whether to wait for the threads.
        """
        pending = self._pending
        if pending is None or not (block or pending.is_done):
            return None
        self._pending = None
        folder = pending.finish()
        logger.info(f"saved {folder}")
        self.last_saved = self._unpruned = folder
        self._best_step = self._next_best_step
        self._prune()
        return pending.step

    def awaits_proof(self, step: int) -> bool:
        """Whether the weights after `step` are those of the newest checkpoint, and no loss has judged them yet."""
        return step == self._newest_step > self._proven_step

    def prove(self, step: int, *, is_good: bool) -> None:
        """The weights after `step` gave finite results: their checkpoint may now replace older ones.

        is_good: and may replace good ones. Otherwise it only replaces those that are not good either.
        """
        self._proven_step = step
        if is_good:
            self._good_step = step
        self._prune()

    def _prune(self) -> None:
        """Removes old checkpoints once the newest one is on disk and proven."""
        newest = self._unpruned
        if newest is None or step_of(newest) > self._proven_step:
            return
        self._unpruned = None
        if self._runtime.is_main:
            folders = step_folders(self._root)
            for is_good in (True, False):
                alike = [folder for folder in folders if (step_of(folder) <= self._good_step) == is_good]
                if alike:
                    prune(self._root, newest, self._keep, self._keep_every, alike, self._best_step)

    def newest_good(self) -> tuple[Path | None, bool]:
        """The newest intact checkpoint whose weights have proven good; whether no other is newer in output_dir."""
        own = step_folders(self._root)
        candidates = [(folder, step_of(folder)) for folder in reversed(own)]
        if self._origin is not None:
            candidates.append((self._origin.folder, self._origin.step))
        for folder, step in candidates:
            if step <= self._good_step and checkpoint_problem(folder) is None and _was_good(folder):
                return folder, not own or folder == own[-1]
        return None, not own

    def restore(self, reader: CheckpointReader) -> TrainState:
        """Fills the engine from a checkpoint; returns the run's progress."""
        self._runtime.together(lambda: self._engine.load_fragments(reader))
        self._engine.load_scaler_state(reader.record.loss_scaler or {})
        self.last_saved = reader.folder
        self._origin, self._newest_step, self._good_step = reader, reader.step, reader.step - 1
        if reader.folder.parent.resolve() == self._root.resolve():
            self._unpruned = reader.folder
            if self._runtime.is_main and not _was_good(reader.folder):
                good = [step_of(each) for each in step_folders(self._root) if _was_good(each)]
                self._good_step = max((step for step in good if step < reader.step), default=-1)
        best = (reader.record.progress or {}).get("best")
        self._best_step = best["step"] if best is not None else None
        saved = {name: value for name, value in (reader.record.progress or {}).items() if name in SHARED_FIELDS}
        return TrainState(**{"step": reader.step} | saved, window=self._window(reader))

    def _window(self, reader: CheckpointReader) -> dict[str, float]:
        """This rank's part of the interrupted metrics window; with another world size, rank 0 takes all of it."""
        windows = [state.get("window", {}) for state in reader.rank_states]
        rank = self._runtime.rank
        if len(windows) == self._runtime.world_size:
            return windows[rank]
        total = sum(window.get("loss", 0.0) for window in windows)
        return windows[0] and {**windows[0], "loss": total if rank == 0 else 0.0}


def _was_good(folder: Path) -> bool:
    """Whether the run had a loss below that of guessing, and skipped no steps, when it saved this checkpoint."""
    try:
        progress = CheckpointReader(folder).record.progress or {}
    except CheckpointError:
        return False
    return not (progress.get("is_worse_than_guessing") or progress.get("skipped_in_a_row"))
