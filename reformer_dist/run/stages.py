"""The parts of a run that change with its stages: rows, layout of a step, task, validator."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from reformer_dist.checkpoint import CheckpointReader
from reformer_dist.config import AttentionKind, RunConfig
from reformer_dist.config.stages import Stage, resolve_stages, stage_at
from reformer_dist.data import Corpus, TrainLoader, merge_states
from reformer_dist.distributed.runtime import Runtime, ranks_per_node
from reformer_dist.engine import TrainEngine
from reformer_dist.models.attention import check_attention_backend
from reformer_dist.models.stage_keys import set_staged_keys
from reformer_dist.parallel import SlicedSequence
from reformer_dist.parallel.sequence import make_sequence
from reformer_dist.planning import JobSpec
from reformer_dist.planning.flops import model_flops
from reformer_dist.planning.peaks import peak_flops
from reformer_dist.process.log import logger
from reformer_dist.run.data import QuarantineFile, TrainingData, check_stages
from reformer_dist.tasks import make_task
from reformer_dist.training.batches import BatchReader
from reformer_dist.training.metrics import StepCost
from reformer_dist.training.metrics_log import MetricsLogger
from reformer_dist.training.parts import RunContext, StepLayout, TaskData
from reformer_dist.training.trainer import StageParts
from reformer_dist.training.validator import Validator


@dataclass(frozen=True)
class OpenStage:
    """A stage whose rows are being read ahead."""

    stage: Stage
    """trainer.max_steps of its config is the step at which the run ends."""
    data: TaskData
    layout: StepLayout
    loader: TrainLoader


class StageOpener:
    """Opens the stages of a run, one after another. Every rank makes the same calls."""

    def __init__(self, config: RunConfig, runtime: Runtime, corpus: Corpus, resources: ExitStack) -> None:
        """Raises ConfigError or DataError on every rank if the data do not fit one of the stages."""
        self._config, self._runtime, self._corpus = config, runtime, corpus
        self._stages = resolve_stages(config)
        self._sequence: SlicedSequence | None = None
        self._loader: TrainLoader | None = None
        resources.callback(self._close_loader)
        runtime.together(lambda: check_stages(config, corpus))

    def open_first(self, checkpoint: CheckpointReader | None) -> OpenStage:
        """The stage in which the run begins or resumes.

        If the run stopped before the evaluation that was due after a step, that is the stage of this step.
        """
        step = 0
        if checkpoint is not None:
            is_observed = (checkpoint.record.progress or {}).get("is_observed", True)
            step = checkpoint.step if is_observed else max(0, checkpoint.step - 1)
        stage = stage_at(self._config, step)
        corpus = self._corpus.reweighted(stage.config.data.weights)
        data = self._runtime.together(lambda: TrainingData.open(stage.config, corpus, checkpoint))
        return self._open(stage, data)

    def open_next(self, step: int, states: Sequence[dict[str, Any]]) -> OpenStage:
        """The stage after `step` steps. states: of the loaders of all ranks."""
        stage = stage_at(self._config, step)
        logger.info(f"stage {stage.index + 1} of {len(self._stages)} begins after step {step}")
        corpus, saved = self._corpus.reweighted(stage.config.data.weights), merge_states(states)
        data = self._runtime.together(lambda: TrainingData.from_state(stage.config, corpus, saved))
        return self._open(stage, data)

    def attach(
        self, opened: OpenStage, run: RunContext, engine: TrainEngine, metrics: MetricsLogger
    ) -> StageParts:
        """Prepares the engine for a stage, between two steps."""
        stage, data, layout = opened.stage, opened.data, opened.layout
        set_staged_keys(engine.module, stage.config.model)
        engine.set_micro_batching(layout.micro_batch, layout.n_micro)
        batches = BatchReader(
            self._runtime,
            layout.sequence,
            opened.loader,
            QuarantineFile(Path(self._config.output_dir)).add,
            run.stop,
            labels_per_row=data.task.labels_per_row,
        )
        validator = Validator(replace(run, config=stage.config), data, layout, engine, metrics)
        return StageParts(stage, data, batches, validator, step_cost(stage.config, self._runtime, data))

    def _open(self, stage: Stage, training_data: TrainingData) -> OpenStage:
        config = training_data.with_last_step(stage.config, self._stages[stage.index :])
        corpus = training_data.corpus
        data = TaskData(corpus, make_task(config, corpus.tokenizer, corpus.labels))
        layout = self._layout(config)
        self._close_loader()
        self._loader = training_data.loader(
            config, layout.sequence.mesh, layout.micro_batch, data.task.make_example
        )
        if training_data.state.step < config.trainer.max_steps:
            self._loader.prefetch()
        return OpenStage(replace(stage, config=config), data, layout, self._loader)

    def _layout(self, config: RunConfig) -> StepLayout:
        """Divides the rows of a step over the ranks, whose mesh is kept if its shape stays."""
        micro_batch, n_micro = config.micro_batching(self._runtime.world_size)
        self._runtime.together(lambda: check_attention_backend(config.model, self._runtime.device))
        mesh = None if self._sequence is None else self._sequence.mesh
        self._sequence = make_sequence(config, self._runtime, micro_batch, mesh)
        return StepLayout(self._sequence, micro_batch, n_micro)

    def _close_loader(self) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None


def step_cost(config: RunConfig, runtime: Runtime, data: TaskData) -> StepCost | None:
    """None if the peak of the devices is unknown, or the work depends on the lengths of samples or documents."""
    has_exact = AttentionKind.exact in config.model.layer_kinds()
    is_fixed = config.task.packs_text and not (config.data.mask_documents and has_exact)
    if runtime.device.type != "cuda" or not is_fixed:
        return None
    peak = peak_flops(torch.cuda.get_device_name(runtime.device), config.trainer.precision)
    if peak is None:
        return None
    job = JobSpec(config, runtime.world_size, ranks_per_node(), data.task.vocab_size, runtime.device.type)
    return StepCost(model_flops(job), peak * runtime.world_size)
