"""Builds the trainer of a run from its RunConfig: data, run directory, rows of the first stage, engine."""

from __future__ import annotations

import math
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from reformer_dist.checkpoint import RunRecord
from reformer_dist.config import RunConfig
from reformer_dist.config.stages import check_ranks, resolve_stages, stage_at
from reformer_dist.data import Corpus
from reformer_dist.distributed.runtime import Preempted, Runtime, Unavailable
from reformer_dist.engine import TrainEngine
from reformer_dist.engine.fragments import parameter_shapes
from reformer_dist.models.attention import check_attention_backend
from reformer_dist.models.block import Block
from reformer_dist.process.live_line import live
from reformer_dist.process.log import logger
from reformer_dist.run.compose import to_dict
from reformer_dist.run.config_changes import config_changes
from reformer_dist.run.data import open_task_data
from reformer_dist.run.directory import (
    RunDirectory,
    check_rate,
    open_run_directory,
    require_same_config,
    require_same_model,
    write_config,
)
from reformer_dist.run.memory_check import require_memory
from reformer_dist.run.pretrained import load_initial_moments, load_initial_weights, require_same_optimizer
from reformer_dist.run.stages import OpenStage, StageOpener
from reformer_dist.run.start_record import record_start
from reformer_dist.training.checkpoint_manager import CheckpointManager, TrainState, has_checkpoints
from reformer_dist.training.metrics_log import MetricsLogger
from reformer_dist.training.parts import EngineParts, RunContext, TaskData
from reformer_dist.training.preemption import StopSignal
from reformer_dist.training.tracker import RunDescription, require_tracker
from reformer_dist.training.trainer import StageParts, Trainer


def build_trainer(
    config: RunConfig, runtime: Runtime, resources: ExitStack, stop: StopSignal | None = None
) -> Trainer:
    """Validates the configuration, builds all parts, and resumes from a checkpoint if there is one.

    resources: cleanup callbacks are registered here. stop: signal that ends the run early. Raises UserError on
    every rank.
    """
    require_same_config(config, runtime)
    check_ranks(config, runtime.world_size)
    runtime.on_main(lambda: require_tracker(config.tracker))
    with live.phase("compiling"):  # the C library, on a CPU without it
        runtime.together(lambda: check_attention_backend(config.model, runtime.device))
    with live.phase("opening the data"):
        data = open_data(config, runtime)
    runtime.together(lambda: require_memory(config, runtime, data.task))
    stages = StageOpener(config, runtime, data.corpus, resources)
    directory = open_run_directory(config, runtime, resources)
    opened = stages.open_first(directory.resume_from)
    config = replace(config, trainer=opened.stage.config.trainer)
    run = RunContext(config, runtime, stop or StopSignal())
    with live.phase("building the model" if directory.resume_from is None else "reading the checkpoint"):
        parts = build_engine(run, opened, directory, resources)

    step = parts.state.step
    if step < config.trainer.max_steps:  # otherwise it would record overrides that were never used
        write_config(config, runtime)
        record_start(directory.path, step, runtime)
    path, is_main = directory.path, runtime.is_main
    described = RunDescription(path, config.tracker.name or path.absolute().name, to_dict(run.config))
    metrics = runtime.together(
        lambda: MetricsLogger(path, is_active=is_main, resume_step=step, tracker=config.tracker, run=described)
    )
    resources.callback(metrics.close)
    first = stages.attach(opened, run, parts.engine, metrics)
    _log_run(run, opened, parts.engine)

    def open_next(step: int, states: list[dict[str, Any]]) -> StageParts:
        return stages.attach(stages.open_next(step, states), run, parts.engine, metrics)

    return Trainer(run, parts, first, open_next, metrics)


def open_data(config: RunConfig, runtime: Runtime) -> TaskData:
    """Opens the run's datasets.

    Raises UserError on every rank, or Preempted if the datasets are unreachable and the run has checkpoints to
    resume from.
    """
    try:
        data = runtime.together(lambda: open_task_data(stage_at(config, 0).config))
    except Unavailable as error:
        if runtime.on_main(lambda: has_checkpoints(config)):
            raise Preempted(f"{error}: nothing was trained; the same command resumes") from None
        raise
    data.corpus.wait_for_sources(min(config.data.retry_seconds, config.parallel.timeout / 2))
    return data


def build_engine(run: RunContext, opened: OpenStage, directory: RunDirectory, resources: ExitStack) -> EngineParts:
    """Builds the engine with its initial or resumed state. Raises UserError on every rank."""
    config, runtime, resume_from, data = run.config, run.runtime, directory.resume_from, opened.data
    model = data.task.build_model().to(runtime.device)
    record, tokenizer_files = _describe_run(config, data.corpus, model)
    if config.init_from is not None and resume_from is None:
        path = config.init_from
        source = runtime.together(lambda: load_initial_weights(path, model, record))
        for change in config_changes({"model": source.config["model"]}, {"model": record.config["model"]}):
            logger.info(f"  changed since the checkpoint: {change}")
    engine = TrainEngine(model, [Block], opened.stage.config, runtime.world_size)
    resources.callback(engine.close)
    checkpoints = CheckpointManager(config, runtime, engine, record=record, extra_files=tokenizer_files)
    if resume_from is None:
        if config.init_from is not None and config.init_moments:
            path = config.init_from
            runtime.together(lambda: load_initial_moments(path, engine, record))
        return EngineParts(engine, checkpoints, TrainState())
    logger.info(f"resuming from {resume_from.folder} at step {resume_from.step}")
    old_size, new_size = resume_from.world_size, runtime.world_size
    changes = [f"world size: {old_size} -> {new_size}"] if old_size != new_size else []
    for change in changes + config_changes(resume_from.record.config, record.config):
        logger.info(f"  changed since the checkpoint: {change}")
    runtime.together(lambda: require_same_model(resume_from, record))
    runtime.together(lambda: require_same_optimizer(resume_from, record))
    if jump := runtime.together(lambda: check_rate(resume_from, config)):
        logger.warning(jump)
    return EngineParts(engine, checkpoints, checkpoints.restore(resume_from))


def _describe_run(config: RunConfig, corpus: Corpus, model: nn.Module) -> tuple[RunRecord, dict[str, bytes]]:
    """The record in the run's checkpoints, and the files of their tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        specification = corpus.tokenizer.save(Path(folder))
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    record = RunRecord(
        config=to_dict(config),
        tokenizer=specification,
        vocab_size=corpus.tokenizer.vocab_size,
        labels=corpus.labels,
        fields=corpus.datasets[0].fields,
        data=corpus.record(),
        shapes=parameter_shapes(model),
    )
    return record, files


def _log_run(run: RunContext, opened: OpenStage, engine: TrainEngine) -> None:
    config, world_size, n_micro = opened.stage.config, run.runtime.world_size, opened.layout.n_micro
    n_parameters = sum(math.prod(shape) for shape in parameter_shapes(engine.module).values())
    rows, corpus = config.data.batch_size, opened.data.corpus
    size = f"{rows * config.data.seq_len:,} tokens" if config.task.packs_text else f"{rows:,} samples"
    if config.data.pack_samples:
        size = f"up to {rows * config.data.seq_len:,} tokens of packed samples"
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''} on {run.runtime.device.type}"
    n_stages = len(resolve_stages(run.config))
    stage = f" | stage {opened.stage.index + 1} of {n_stages}" if n_stages > 1 else ""
    logger.info(
        f"{n_parameters:,} parameters | ZeRO stage {config.deepspeed.stage}, "
        f"{config.trainer.precision.name}, {ranks} | {size} per step in {n_micro} micro-batch"
        f"{'es' if n_micro > 1 else ''} | {corpus.total('tokens', 'train'):,} training tokens in "
        f"{len(corpus.shards('train'))} shards{stage}"
    )
