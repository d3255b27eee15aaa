"""Training data of a run: datasets, sampling order, position to resume from, and the log of damaged samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reformer_dist.checkpoint import CheckpointReader
from reformer_dist.config import DataConfig, RunConfig
from reformer_dist.config.stages import Stage, resolve_stages
from reformer_dist.data import (
    Corpus,
    DamagedSample,
    Era,
    LoaderState,
    MakeExample,
    Quarantine,
    Sampler,
    TrainLoader,
    consumed_hash,
    describe_changes,
    merge_states,
    read_state,
    saved_interleaving,
)
from reformer_dist.distributed.mesh import SequenceMesh
from reformer_dist.errors import DataError
from reformer_dist.process.log import logger
from reformer_dist.tasks import make_task
from reformer_dist.training.parts import TaskData

QUARANTINE_FILE = "quarantine.jsonl"


def open_corpus(data: DataConfig, splits: Sequence[str]) -> Corpus:
    """Opens the run's datasets, and checks that no shard of these splits is missing. Raises DataError."""
    corpus = Corpus.open(data.paths(), data.weights, data.cache_dir, data.cache_gb)
    for split in splits:
        for warning in corpus.check(split, data.max_damaged_fraction):
            logger.warning(warning)
    return corpus


def open_task_data(config: RunConfig) -> TaskData:
    """Opens the datasets of a training run and makes their task. Raises DataError if they do not fit.

    The run reads the split train, and heldout if it evaluates or samples.
    """
    needs_heldout = config.trainer.eval_every > 0 or config.trainer.sample_every > 0
    corpus = open_corpus(config.data, ["train", "heldout"] if needs_heldout else ["train"])
    if needs_heldout and corpus.total("tokens", "heldout") == 0:
        fix = "write it again with --heldout above 0, or set trainer.eval_every=0 trainer.sample_every=0"
        raise DataError(f"{corpus.where}: no documents are held out for evaluation; {fix}")
    task = make_task(config, corpus.tokenizer, corpus.labels)
    task.check(corpus)
    return TaskData(corpus, task)


def open_sampler(config: RunConfig, corpus: Corpus, saved: Mapping[str, Any] | None) -> Sampler:
    """The data order of a run, which stays that of its saved loader state, if there is one."""
    data = config.data
    return Sampler(
        corpus,
        seed=config.trainer.seed,
        batch_size=data.batch_size,
        seq_len=data.seq_len,
        shuffle=data.shuffle,
        by_sample=not config.task.packs_text,
        interleaved_shards=None if saved is None else saved_interleaving(saved),
        pack_samples=data.pack_samples,
    )


def check_stages(config: RunConfig, corpus: Corpus) -> None:
    """Raises ConfigError or DataError if the data do not fit one of the stages of a run."""
    for stage in resolve_stages(config):
        data = corpus.reweighted(stage.config.data.weights)
        make_task(stage.config, data.tokenizer, data.labels).check(data)
        open_sampler(stage.config, data, None)


def saved_loader_state(checkpoint: CheckpointReader) -> dict[str, Any]:
    """Of all ranks together."""
    return merge_states([rank["data"] for rank in checkpoint.rank_states])


def describe_rows(settings: Mapping[str, Any]) -> str:
    """Rows of a step, from the settings of a sampler."""
    length = "one sample each" if settings.get("by_sample") else f"{settings['seq_len']} tokens"
    if packed_len := settings.get("packed_len"):
        length = f"samples in {packed_len} tokens"
    return f"{settings['batch_size']} of {length}"


@dataclass(frozen=True)
class TrainingData:
    """The sampling order of a run's data, and the position at which the run starts or resumes."""

    corpus: Corpus
    sampler: Sampler
    state: LoaderState

    @classmethod
    def open(cls, config: RunConfig, corpus: Corpus, checkpoint: CheckpointReader | None) -> TrainingData:
        """Raises DataError if the checkpoint's position does not fit these data."""
        if checkpoint is None:
            return cls(corpus, open_sampler(config, corpus, None), LoaderState())
        saved_data, saved = checkpoint.record.data, saved_loader_state(checkpoint)
        changes = [] if saved_data is None else describe_changes(saved_data, corpus.record())
        opened = cls.from_state(config, corpus, saved, changes)
        logger.info(
            f"resuming data after step {opened.state.step}; hash of all samples so far: {consumed_hash(saved)}"
        )
        return opened

    @classmethod
    def from_state(
        cls, config: RunConfig, corpus: Corpus, saved: Mapping[str, Any], changes: Sequence[str] = ()
    ) -> TrainingData:
        """saved: of all ranks together, perhaps with other rows. Raises DataError as `read_state` does."""
        sampler = open_sampler(config, corpus, saved)
        state = read_state(saved, sampler, changes=changes, accept_changed=config.data.accept_changed)
        before, now = (describe_rows(settings) for settings in (saved["settings"], sampler.settings()))
        if before != now:
            logger.info(f"rows of a step: {before} -> {now}; what is left of the data is divided among them")
        return cls(corpus, sampler, state)

    def with_last_step(self, config: RunConfig, stages: Sequence[Stage] = ()) -> RunConfig:
        """The configuration with trainer.max_steps lowered to the step at which data.epochs ends the run.

        stages: the current one and those after it.
        """
        if config.data.epochs == 0:
            return config
        cut = None if self.state.cuts is None else self.state.cuts[0]
        last = self.sampler.last_step(config.data.epochs, self.state.origin, cut, self._eras(stages))
        if config.trainer.max_steps < last:
            reason = f"data.epochs={config.data.epochs} would take {last} steps"
            logger.warning(f"trainer.max_steps={config.trainer.max_steps}: ends the run first; {reason}")
            return config
        logger.info(f"data.epochs={config.data.epochs} ends the run at step {last}")
        return replace(config, trainer=replace(config.trainer, max_steps=max(1, last)))

    def _eras(self, stages: Sequence[Stage]) -> list[Era]:
        """Stages, without borders at which the rows stay the same."""
        eras: list[Era] = []
        for stage in stages:
            data = stage.config.data
            is_fixed = self.sampler.by_sample and self.sampler.packed_len is None
            era = Era(stage.end_step, data.batch_size, 1 if is_fixed else data.seq_len)
            if eras and replace(eras[-1], end_step=era.end_step) == era:
                eras.pop()
            eras.append(era)
        return eras

    def loader(
        self, config: RunConfig, mesh: SequenceMesh, micro_batch: int, make_example: MakeExample
    ) -> TrainLoader:
        """The loader of a data-parallel rank."""
        data = config.data
        n_samples = self.corpus.total("samples", "train")
        return TrainLoader(
            self.sampler,
            Quarantine(n_samples, data.max_damaged_fraction, self.state.quarantine),
            micro_batch_size=micro_batch,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            state=self.state,
            passes=data.epochs or None,
            make_example=make_example,
            workers=data.workers,
        )


class QuarantineFile:
    """Lists each damaged sample of a run once, as JSON lines for people to read."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / QUARANTINE_FILE

    def add(self, damaged: list[DamagedSample]) -> None:
        """Appends new samples, and logs a warning for each sample. A write error does not end the run."""
        for sample in damaged:
            logger.warning(f"skipped damaged sample: {sample}")
        lines = [json.dumps(asdict(sample), sort_keys=True) for sample in damaged]
        try:
            known = set(self._path.read_text().splitlines()) if self._path.exists() else set()
            with self._path.open("a") as file:
                file.writelines(f"{line}\n" for line in lines if line not in known)
        except OSError as error:
            logger.warning(f"{self._path}: can't be written ({error.strerror})")
