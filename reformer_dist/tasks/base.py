"""Interface of a task: the conversion of rows to model inputs, and the evaluation of the model's outputs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

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
    Dataset,
    DrawKey,
    Example,
    RowSelection,
    Sample,
    Span,
    Tokenizer,
    collate,
    count_rows,
    heldout_sample_batches,
    make_sample,
    read_split,
)
from reformer_dist.errors import DataError
from reformer_dist.models.sequence import SequenceAccess
from reformer_dist.process.log import logger

AllGather = Callable[[list[Any]], list[Any]]
"""Concatenates the lists of all ranks, with the same result on each."""


def warn_damaged(sample: DamagedSample) -> None:
    logger.warning(f"not evaluated: {sample}")


@dataclass(frozen=True)
class TaskMetrics:
    """Metrics that need more than the loss of held-out rows, such as generated texts."""

    values: dict[str, float] = field(default_factory=dict)
    """By name, such as bleu, in percent."""
    lines: list[str] = field(default_factory=list)
    """A report of them for people."""


class Task(ABC):
    """A task of a run or checkpoint, with its config, its tokenizer and, for classification, its labels."""

    extra_tokens: ClassVar[int] = 0
    """Token ids of the model after those of the tokenizer."""
    reports_accuracy: ClassVar[bool] = True
    """Whether evaluation reports the fraction of labels that the model predicts."""
    reports_bits_per_byte: ClassVar[bool] = False
    """Whether the loss is also reported in bits per byte of text."""
    labels_per_row: ClassVar[bool] = False
    """Whether labels belong to rows rather than to tokens."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, labels: Sequence[str] = ()) -> None:
        self.config, self.tokenizer, self.labels = config, tokenizer, list(labels)
        self.vocab_size = tokenizer.vocab_size + self.extra_tokens

    @abstractmethod
    def build_model(self) -> nn.Module: ...

    @abstractmethod
    def check(self, corpus: Corpus) -> None:
        """Raises DataError if the task can't read the datasets."""

    @abstractmethod
    def make_example(self, spans: list[Span], draw_key: DrawKey) -> Example:
        """Model inputs and labels of a training row."""

    @abstractmethod
    def heldout(self, corpus: Corpus, rows: RowSelection) -> Iterator[Batch]:
        """Evaluation batches of a rank, the same number on each. Raises DataError if the split is empty."""

    def count_rows(self, corpus: Corpus, split: str = "heldout") -> int:
        """Rows of a split if all of them are evaluated."""
        return count_rows(corpus, split, self.config.data.seq_len if self.config.task.packs_text else None)

    def predict(self, outputs: Any, sequence: SequenceAccess) -> Tensor:
        """Predicted labels from the model's outputs on this rank's slice of the rows."""
        return outputs.argmax(-1)

    @property
    def token_bytes(self) -> Tensor | None:
        """Bytes of text of each token, [vocab_size], if the loss is reported in bits per byte, else None."""
        lengths = self.tokenizer.token_bytes
        return torch.from_numpy(lengths) if self.reports_bits_per_byte and lengths.any() else None

    @property
    def guessing_loss(self) -> float:
        """Loss of a uniform guess in nats per token; infinite if labels are not tokens of the vocabulary."""
        return math.inf if self.labels_per_row else math.log(self.vocab_size)

    def measure(self, model: nn.Module, corpus: Corpus, rows: RowSelection, gather: AllGather) -> TaskMetrics:
        """The task's metrics of a trained model beside loss and accuracy, the same on every rank."""
        return TaskMetrics()


class SampleTask(Task):
    """A task whose rows hold one sample each."""

    field_names: ClassVar[tuple[str, ...]] = ("text",)
    """Roles of the fields of a sample, in order; a dataset may name them differently."""
    reads_spans: ClassVar[bool] = False
    """Whether samples of one field may say which of their tokens are labels."""
    shards_args: ClassVar[str]
    """Arguments of reformer-shards that write such a dataset."""

    @abstractmethod
    def encode(self, sample: Sample, draw_key: DrawKey) -> Example: ...

    def padding_metadata(self) -> dict[str, Any]:
        """Metadata of the empty samples that are encoded for rows of padding."""
        return {}

    def check(self, corpus: Corpus) -> None:
        for dataset in corpus.datasets:
            if len(dataset.fields) != len(self.field_names) and not (self.reads_spans and dataset.has_label_spans):
                actual, needed = ", ".join(dataset.fields), " and ".join(self.field_names)
                needs = f"task.kind={self.config.task.kind.name} needs {needed}"
                hint = f"write it with reformer-shards {self.shards_args}"
                raise DataError(f"data.path={dataset.folder.address}: its samples hold {actual}; {needs}; {hint}")
            if dataset.has_label_spans and not self.reads_spans:
                raise DataError(spans_refused(dataset, self.config.task.kind.name))

    def make_example(self, spans: list[Span], draw_key: DrawKey) -> Example:
        sample = make_sample(spans[0].ref, spans[0].tokens) if spans else None
        return self._encode_or_pad(sample, draw_key)

    def heldout(self, corpus: Corpus, rows: RowSelection) -> Iterator[Batch]:
        return heldout_sample_batches(corpus, rows, self._encode_or_pad, report=warn_damaged)

    def samples(self, corpus: Corpus, rows: RowSelection) -> Iterator[Sample]:
        """The samples of a split that a rank evaluates."""
        return read_split(corpus, rows, report=warn_damaged)

    def _encode_or_pad(self, sample: Sample | None, draw_key: DrawKey) -> Example:
        if sample is not None:
            return self.encode(sample, draw_key)
        padding = Sample("", (np.zeros(0, np.int64),) * len(self.field_names), self.padding_metadata())
        example = self.encode(padding, draw_key)
        return {**example, "labels": np.full_like(example["labels"], IGNORE_INDEX)}


def spans_refused(dataset: Dataset, kind: str) -> str:
    actual = f"data.path={dataset.folder.address}: its samples say which of their tokens are labels"
    return f"{actual}; task.kind={kind} predicts others: use task.kind=completion"


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def model_inputs(examples: Sequence[Example], device: torch.device) -> Batch:
    """The inputs of a model for rows without labels."""
    inputs = [{name: array for name, array in each.items() if name != "labels"} for each in examples]
    return {name: tensor.to(device) for name, tensor in collate(inputs).items()}


def concat_ids(*parts: NDArray[Any] | list[int]) -> NDArray[np.int64]:
    """Token ids of several parts, concatenated."""
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
