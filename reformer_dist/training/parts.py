"""The parts of a run that its trainer and validator share, as run/build.py builds them."""

from __future__ import annotations

from dataclasses import dataclass

from reformer_dist.config import RunConfig, TaskKind
from reformer_dist.data import Corpus
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.engine import TrainEngine
from reformer_dist.parallel import SlicedSequence
from reformer_dist.tasks import Task
from reformer_dist.training.checkpoint_manager import CheckpointManager, TrainState
from reformer_dist.training.preemption import StopSignal


@dataclass(frozen=True)
class RunContext:
    """Resolved configuration, process group and stop signal of a run."""

    config: RunConfig
    runtime: Runtime
    stop: StopSignal


@dataclass(frozen=True)
class StepLayout:
    """Division of a step's rows over ranks and micro-batches."""

    sequence: SlicedSequence
    micro_batch: int
    """Rows per micro-batch."""
    n_micro: int
    """Micro-batches per step and rank."""


@dataclass(frozen=True)
class TaskData:
    """Datasets of a run, and the task that reads them."""

    corpus: Corpus
    task: Task

    @property
    def bytes_per_token(self) -> float | None:
        """Mean bytes of text per training token; None unless the task is language modeling."""
        is_text = self.task.config.task.kind is TaskKind.language_model
        return self.corpus.bytes_per_token if is_text else None


@dataclass(frozen=True)
class EngineParts:
    """Engine with the weights to start from, its checkpoints, and the progress of the run."""

    engine: TrainEngine
    checkpoints: CheckpointManager
    state: TrainState
