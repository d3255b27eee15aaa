"""The composition root: from a RunConfig to everything that trains. It alone knows all parts."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reformer_dist.checkpoint import CheckpointReader
from reformer_dist.config import RunConfig, TaskKind
from reformer_dist.data import Corpus
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.engine import TrainEngine
from reformer_dist.engine.fragments import parameter_shapes
from reformer_dist.models.attention import require_attention
from reformer_dist.models.block import Block
from reformer_dist.parallel.sequence import share_sequences
from reformer_dist.process.log import logger
from reformer_dist.run.compose import plain
from reformer_dist.run.data import TrainingData, QuarantineFile, open_training_corpus
from reformer_dist.run.directory import changed_keys, open_run_directory, require_same_config, write_config
from reformer_dist.run.pretrained import load_initial_weights
from reformer_dist.training.validator import Validator
from reformer_dist.tasks import Task, make_task
from reformer_dist.training.batches import BatchReader
from reformer_dist.training.checkpoint_manager import CheckpointManager, find_resume_checkpoint
from reformer_dist.training.metrics_log import MetricsLogger
from reformer_dist.training.preemption import StopSignal
from reformer_dist.training.trainer import TrainState, Trainer


def build_trainer(
    config: RunConfig, runtime: Runtime, resources: ExitStack, stop: StopSignal | None = None
) -> Trainer:
    """Checks everything that can be checked, builds all parts, and resumes if there is something to resume.

    What must be closed at the end of the run is pushed on `resources`; `stop` tells when to end early.
    Raises UserError, alike on every rank.
    """
    stop = stop or StopSignal()
    require_same_config(config, runtime)
    micro_batch, n_micro = config.micro_batching(runtime.world_size)
    runtime.together(lambda: require_attention(config.model, runtime.device))
    corpus = runtime.together(lambda: open_training_corpus(config))
    task = runtime.together(lambda: _make_task(config, corpus))
    sequence = share_sequences(config, runtime, micro_batch)
    folder = open_run_directory(config, runtime, resources)
    start = find_resume_checkpoint(config, runtime)  # after that: no other job may add checkpoints any more

    feed = runtime.together(lambda: TrainingData.open(config, corpus, start))
    config = feed.with_last_step(config)
    model = task.build_model().to(runtime.device)
    description, tokenizer_files = _describe(config, corpus, model)
    if config.init_from is not None and start is None:
        path, tokenizer = config.init_from, description["tokenizer"]
        runtime.together(lambda: load_initial_weights(path, model, tokenizer))
    engine = TrainEngine(model, [Block], config, runtime.world_size)
    resources.callback(engine.close)
    checkpoints = CheckpointManager(config, runtime, engine, description=description, extra_files=tokenizer_files)
    if start is not None:
        _announce_resume(start, config, runtime)
    progress = checkpoints.restore(start) if start is not None else TrainState()
    loader = feed.loader(config, sequence.mesh, micro_batch, task.make_example)
    resources.callback(loader.close)
    if progress.step < config.trainer.max_steps:  # else overrides would be recorded that trained nothing
        write_config(config, runtime)
    journal = runtime.together(lambda: MetricsLogger(folder, is_active=runtime.is_main, resume_step=progress.step))
    resources.callback(journal.close)
    probes = Validator(config, runtime, engine, sequence, corpus, task, journal, stop)
    _announce(config, runtime, corpus, description["shapes"], n_micro)
    bytes_per_token = corpus.bytes_per_token if config.task.kind is TaskKind.language_model else None
    report, of_rows = QuarantineFile(folder).add, task.labels_per_row
    intake = BatchReader(runtime, sequence, loader, report, stop, labels_per_row=of_rows)
    return Trainer(config, runtime, engine, intake, checkpoints, probes, journal, progress, bytes_per_token)


def _make_task(config: RunConfig, corpus: Corpus) -> Task:
    task = make_task(config, corpus.tokenizer, corpus.labels)
    task.check(corpus)
    return task


def _describe(config: RunConfig, corpus: Corpus, model: nn.Module) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What a checkpoint says of its run, and the files, if any, that its tokenizer needs to be loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        specification = corpus.tokenizer.save(Path(folder))
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    description = {
        "config": plain(config),
        "tokenizer": specification,
        "vocab_size": corpus.tokenizer.vocab_size,
        "labels": corpus.labels,
        "data": corpus.record(),
        "shapes": parameter_shapes(model),
    }
    return description, files


def _announce_resume(start: CheckpointReader, config: RunConfig, runtime: Runtime) -> None:
    logger.info(f"resuming from {start.folder} at step {start.step}")
    ranks = [f"ranks of the job: {start.world_size} -> {runtime.world_size}"]
    changed = ranks if start.world_size != runtime.world_size else []
    for line in changed + changed_keys(start.run["config"], config):
        logger.info(f"  changed since: {line}")


def _announce(
    config: RunConfig, runtime: Runtime, corpus: Corpus, shapes: dict[str, list[int]], n_micro: int
) -> None:
    n_parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    rows = config.data.batch_size
    size = f"{rows * config.data.seq_len:,} tokens" if config.task.packs_text else f"{rows:,} samples"
    ranks = f"{runtime.world_size} rank{'s' if runtime.world_size > 1 else ''} on {runtime.device.type}"
    logger.info(
        f"{n_parameters:,} parameters | ZeRO stage {config.deepspeed.stage}, "
        f"{config.trainer.precision.name}, {ranks} | {size} a step in {n_micro} micro-batch"
        f"{'es' if n_micro > 1 else ''} | {corpus.total('tokens', 'train'):,} training tokens in "
        f"{len(corpus.parts('train'))} shards"
    )
