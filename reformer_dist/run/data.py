"""What feeds a run: from its configuration, and the checkpoint it goes on from, to the batches of a rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from reformer_dist.checkpoint import CheckpointReader
from reformer_dist.config import DataConfig, RunConfig
from reformer_dist.data import (
    Corpus,
    DamagedSample,
    LoaderState,
    MakeExample,
    Quarantine,
    Sampler,
    TrainLoader,
    consumed_hash,
    describe_changes,
    merge_states,
    read_state,
)
from reformer_dist.distributed.mesh import SequenceMesh
from reformer_dist.errors import DataError
from reformer_dist.process.log import logger

QUARANTINE_FILE = "quarantine.jsonl"


def open_corpus(data: DataConfig, splits: Sequence[str]) -> Corpus:
    """The run's data sets, with every shard of these splits in place. Raises DataError."""
    corpus = Corpus.open(data.paths(), data.weights, data.cache_dir, data.cache_gb)
    for split in splits:
        for warning in corpus.check(split, data.max_damaged_fraction):
            logger.warning(warning)
    return corpus


def open_training_corpus(config: RunConfig) -> Corpus:
    """The same, with held-out text if the run looks at any. Raises DataError."""
    looks = config.trainer.eval_every > 0 or config.trainer.sample_every > 0
    corpus = open_corpus(config.data, ["train", "heldout"] if looks else ["train"])
    if looks and corpus.total("tokens", "heldout") == 0:
        fix = "write it again with --heldout above 0, or set trainer.eval_every=0 trainer.sample_every=0"
        raise DataError(f"{corpus.where}: no documents are held out for evaluation; {fix}")
    return corpus


@dataclass(frozen=True)
class TrainingData:
    """The order of a run's data, and where in it the run stands."""

    corpus: Corpus
    sampler: Sampler
    state: LoaderState

    @classmethod
    def open(cls, config: RunConfig, corpus: Corpus, checkpoint: CheckpointReader | None) -> TrainingData:
        """Raises DataError where the checkpoint's place is not one in these data."""
        data = config.data
        sampler = Sampler(
            corpus,
            seed=config.trainer.seed,
            batch_size=data.batch_size,
            seq_len=data.seq_len,
            shuffle=data.shuffle,
            by_sample=not config.task.packs_text,
        )
        if checkpoint is None:
            return cls(corpus, sampler, LoaderState())
        changes = describe_changes(checkpoint.run["data"], corpus.record()) if "data" in checkpoint.run else []
        saved = merge_states([rank["data"] for rank in checkpoint.rank_states])
        state = read_state(saved, sampler, changes=changes, accept_changed=data.accept_changed)
        logger.info(f"data go on behind step {state.step}; hash of all samples so far: {consumed_hash(saved)}")
        return cls(corpus, sampler, state)

    def with_last_step(self, config: RunConfig) -> RunConfig:
        """The configuration with the step at which data.epochs ends the run, if that comes before another end."""
        if config.data.epochs == 0:
            return config
        first_step, first_pass = self.state.origin
        last = first_step + self.sampler.steps_for(config.data.epochs - first_pass)
        if config.trainer.max_steps < last:
            ends = f"trainer.max_steps={config.trainer.max_steps} ends the run before"
            logger.warning(f"{ends} data.epochs={config.data.epochs}, which takes {last} steps")
            return config
        logger.info(f"data.epochs={config.data.epochs} ends the run at step {last}")
        return replace(config, trainer=replace(config.trainer, max_steps=max(1, last)))

    def loader(
        self, config: RunConfig, mesh: SequenceMesh, micro_batch: int, make_example: MakeExample
    ) -> TrainLoader:
        """The batches of a data-parallel rank."""
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
    """Names each damaged sample of a run once, a line of JSON for each; for people to read."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / QUARANTINE_FILE

    def add(self, damaged: list[DamagedSample]) -> None:
        """Says so in the log as well; a disk that is full is no reason to end the run."""
        for damage in damaged:
            logger.warning(f"passed over: {damage}")
        lines = [json.dumps(asdict(damage), sort_keys=True) for damage in damaged]
        try:
            known = set(self._path.read_text().splitlines()) if self._path.exists() else set()
            with self._path.open("a") as file:
                file.writelines(f"{line}\n" for line in lines if line not in known)
        except OSError as error:
            logger.warning(f"{self._path}: can't be written ({error.strerror})")
