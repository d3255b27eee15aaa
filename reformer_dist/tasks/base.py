"""What every task says: how rows become what its model is given, and how what the model does is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reformer_dist.config import RunConfig
from reformer_dist.data import (
    IGNORE_INDEX,
    Batch,
    Corpus,
    DamagedSample,
    Example,
    Span,
    Sample,
    Tokenizer,
    DrawKey,
    collate,
    make_sample,
    read_split,
)
from reformer_dist.errors import DataError
from reformer_dist.models.sequence import SequenceAccess
from reformer_dist.process.log import logger

HELDOUT = -1  # no stream of training has this number


def _warn(damage: DamagedSample) -> None:
    logger.warning(f"not evaluated: {damage}")


Gather = Callable[[list[Any]], list[Any]]
"""What all ranks have, joined: the same on each."""


@dataclass(frozen=True)
class Rows:
    """Which rows a rank looks at to measure a model."""

    most: int
    """Of all ranks; 0 means every one."""
    micro_batch: int
    rank: int = 0
    size: int = 1
    max_damaged_fraction: float = 0.0
    split: str = "heldout"
    """Or "train", to see what was learnt by heart; of tasks that read samples."""
    report: Callable[[DamagedSample], None] = _warn


class HeldoutBatch(Protocol):
    """Held-out rows, and what the model is given of them."""

    @property
    def tensors(self) -> Batch: ...


@dataclass(frozen=True)
class SampleBatch:
    """One held-out sample in each row."""

    tensors: Batch


class Task(ABC):
    """Made for a run or a checkpoint: of its configuration, its tokenizer and, where it classifies, its labels."""

    extra_tokens: ClassVar[int] = 0
    """Ids behind those of the tokenizer."""
    reports_accuracy: ClassVar[bool] = True
    """Whether an evaluation tells the share of labels that the model says, too."""
    labels_per_row: ClassVar[bool] = False
    """Whether labels are of whole rows rather than of tokens."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, labels: Sequence[str] = ()) -> None:
        self.config, self.tokenizer, self.labels = config, tokenizer, list(labels)
        self.vocab_size = tokenizer.vocab_size + self.extra_tokens

    @abstractmethod
    def build_model(self) -> nn.Module: ...

    @abstractmethod
    def check(self, corpus: Corpus) -> None:
        """Raises DataError where the data sets are not of the kind that the task reads."""

    @abstractmethod
    def make_example(self, pieces: list[Span], visit: DrawKey) -> Example:
        """What the model is given of one row in training."""

    @abstractmethod
    def heldout(self, corpus: Corpus, rows: Rows) -> Iterator[HeldoutBatch]:
        """Held-out batches of a rank; every rank gets as many. Raises DataError where there is nothing."""

    def predict(self, outputs: Any, sequence: SequenceAccess) -> Tensor:
        """What the model takes for the labels, from what it returns without them of the part of rows at hand."""
        return outputs.argmax(-1)

    @property
    def token_bytes(self) -> Tensor | None:
        """[vocab_size]: bytes of text of each token, where the loss is told as bits per byte."""
        return None

    def measure(self, model: nn.Module, corpus: Corpus, rows: Rows, gather: Gather) -> list[str]:
        """Lines that tell the task's own measures of a trained model, the same on every rank."""
        return []


class SampleTask(Task):
    """One sample in a row."""

    needs: ClassVar[tuple[str, ...]] = ("text",)
    """What its fields are; a data set may call them otherwise."""
    make_shards_args: ClassVar[str]
    """Arguments of tools/make_shards.py that write such a data set."""

    @abstractmethod
    def example(self, sample: Sample, visit: DrawKey) -> Example: ...

    def blank(self) -> Sample:
        """A sample of which nothing is asked, where there are no more rows."""
        return Sample("", (np.zeros(0, np.int64),) * len(self.needs), self.blank_facts())

    def blank_facts(self) -> dict[str, Any]:
        """What such a sample says beside its fields."""
        return {}

    def check(self, corpus: Corpus) -> None:
        for dataset in corpus.datasets:
            if len(dataset.fields) != len(self.needs):
                kind, where = self.config.task.kind.name, dataset.folder.address
                found, needed = ", ".join(dataset.fields), " and ".join(self.needs)
                right = f"task.kind={kind} needs {needed}; write it with make_shards.py {self.make_shards_args}"
                raise DataError(f"data.path={where}: its samples hold {found}; {right}")

    def make_example(self, pieces: list[Span], visit: DrawKey) -> Example:
        return self._example(make_sample(pieces[0].source, pieces[0].tokens) if pieces else None, visit)

    def heldout(self, corpus: Corpus, rows: Rows) -> Iterator[SampleBatch]:
        n_rows = corpus.total("samples", rows.split)
        n_rows = min(n_rows, rows.most) if rows.most else n_rows
        if n_rows == 0:
            raise DataError(f"{corpus.where}: no samples are held out; write it again with --heldout-from")
        n_batches = -(-n_rows // (rows.size * rows.micro_batch))
        own = self.samples(corpus, rows)
        visits = ((HELDOUT, number, 0) for number in count(rows.rank, rows.size))

        def batch() -> SampleBatch:
            found = [next(own, None) for _ in range(rows.micro_batch)]
            return SampleBatch(collate([self._example(sample, next(visits)) for sample in found]))

        return (batch() for _ in range(n_batches))

    def samples(self, corpus: Corpus, rows: Rows) -> Iterator[Sample]:
        """A rank's held-out samples: those of its number, and every `rows.size`-th from there."""
        return read_split(
            corpus,
            split=rows.split,
            rows=rows.most,
            dp_rank=rows.rank,
            dp_size=rows.size,
            max_damaged_fraction=rows.max_damaged_fraction,
            report=rows.report,
        )

    def _example(self, sample: Sample | None, visit: DrawKey) -> Example:
        if sample is not None:
            return self.example(sample, visit)
        example = self.example(self.blank(), visit)
        return {**example, "labels": np.full_like(example["labels"], IGNORE_INDEX)}


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def row_of(*parts: NDArray[Any] | list[int]) -> NDArray[np.int64]:
    """Token ids one behind the other."""
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
