"""Held-out batches, and the bytes of text that convert their loss to bits per byte.

The documents of the held-out split, in shard order, form one text that begins with an end-of-text token and is cut
into rows. Every token of the split is predicted exactly once, so the bytes predicted are those of the split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reformer_dist.data.format.corpus import Corpus
from reformer_dist.data.format.quarantine import CheckedReader, DamagedSample, Quarantine
from reformer_dist.data.format.sample_reader import Sample, SampleRef, make_sample
from reformer_dist.data.loading.collate import Batch, Example, collate, next_token_example
from reformer_dist.data.loading.packing import Tokens
from reformer_dist.data.loading.sampler import DrawKey
from reformer_dist.errors import DataError
from reformer_dist.ops.cross_entropy import IGNORE_INDEX

Report = Callable[[DamagedSample], None]


@dataclass(frozen=True)
class RowSelection:
    """The rows of a split that one data-parallel rank evaluates: rank i % dp_size reads row i."""

    max_rows: int = 0
    """Over all ranks; 0 for all rows."""
    micro_batch_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    max_damaged_fraction: float = 0.0
    split: str = "heldout"
    """Or "train", for tasks with one sample per row."""

    def n_rows(self, available: int) -> int:
        """Rows of all ranks if the split has `available` rows."""
        return min(available, self.max_rows) if self.max_rows else available


def heldout_text_batches(
    corpus: Corpus,
    rows: RowSelection,
    *,
    seq_len: int,
    report: Report = lambda sample: None,
    make_example: Callable[[NDArray[np.int64], NDArray[np.int64], DrawKey], Example] = (
        lambda tokens, labels, draw_key: next_token_example(tokens, labels)
    ),
) -> Iterator[Batch]:
    """Batches of held-out text. Every rank gets the same number, the last ones filled with rows of padding.

    make_example: called with tokens [seq_len + 1], labels [seq_len] and the draw key of each row. Damaged samples
    are skipped and reported. Raises DataError if nothing is held out and, while iterating, if a shard is missing
    or too many samples are damaged.
    """
    n_rows = -(-corpus.total("tokens", "heldout") // seq_len)
    if n_rows == 0:
        raise DataError(f"{corpus.where}: no documents are held out; write it again with --heldout above 0")
    n_rows = rows.n_rows(n_rows)
    eos_id = corpus.tokenizer.eos_id
    documents = (tokens for _, tokens in _read_split(corpus, rows, report))
    texts = islice(_cut_rows(documents, eos_id, seq_len), rows.dp_rank, n_rows, rows.dp_size)
    row_numbers = count(rows.dp_rank, rows.dp_size)

    def next_example() -> Example:
        text = next(texts, np.zeros(0, dtype=np.int64))  # shorter than a row at the end, then empty
        tokens = np.full(seq_len + 1, eos_id, dtype=np.int64)
        labels = np.full(seq_len, IGNORE_INDEX, dtype=np.int64)
        tokens[: len(text)] = text
        labels[: max(0, len(text) - 1)] = text[1:]
        return make_example(tokens, labels, DrawKey.heldout(next(row_numbers)))

    return _batches(next_example, rows, n_rows)


def heldout_sample_batches(
    corpus: Corpus,
    rows: RowSelection,
    make_example: Callable[[Sample | None, DrawKey], Example],
    *,
    report: Report = lambda sample: None,
) -> Iterator[Batch]:
    """Batches of held-out samples, one per row. Every rank gets the same number.

    make_example: called with None for rows of padding. Damaged samples are skipped and reported. Raises DataError
    if the split is empty and, while iterating, if a shard is missing or too many samples are damaged.
    """
    n_rows = corpus.total("samples", rows.split)
    if n_rows == 0:
        raise DataError(f"{corpus.where}: no samples are held out; write it again with --heldout-from")
    samples = read_split(corpus, rows, report=report)
    row_numbers = count(rows.dp_rank, rows.dp_size)
    return _batches(
        lambda: make_example(next(samples, None), DrawKey.heldout(next(row_numbers))), rows, rows.n_rows(n_rows)
    )


def read_split(corpus: Corpus, rows: RowSelection, *, report: Report = lambda sample: None) -> Iterator[Sample]:
    """The samples that a rank evaluates. Damaged ones are skipped and reported.

    Raises DataError while iterating if a shard is missing or too many samples are damaged.
    """
    samples = islice(_read_split(corpus, rows, report), rows.dp_rank, rows.max_rows or None, rows.dp_size)
    return (make_sample(ref, tokens) for ref, tokens in samples)


def count_text_bytes(labels: torch.Tensor, token_bytes: NDArray[np.int64]) -> int:
    """Bytes of text of all labels but IGNORE_INDEX. token_bytes: the tokenizer's, [vocab_size]."""
    predicted = labels[labels != IGNORE_INDEX]
    return int(torch.from_numpy(token_bytes).to(labels.device)[predicted].sum())


def _batches(next_example: Callable[[], Example], rows: RowSelection, n_rows: int) -> Iterator[Batch]:
    # the same number on each rank, since all take part in the same collectives
    n_batches = -(-n_rows // (rows.dp_size * rows.micro_batch_size))
    return (collate([next_example() for _ in range(rows.micro_batch_size)]) for _ in range(n_batches))


def _read_split(corpus: Corpus, rows: RowSelection, report: Report) -> Iterator[tuple[SampleRef, Tokens]]:
    """Undamaged samples of a split and their tokens."""
    quarantine = Quarantine(corpus.total("samples", rows.split), rows.max_damaged_fraction)
    with closing(CheckedReader(quarantine)) as reader:
        for shard in corpus.shards(rows.split):
            for entry in shard.index.entries:
                ref = SampleRef(shard.dataset, shard.shard, entry)
                tokens = reader.open(shard.dataset_index, ref)
                for sample in reader.skipped_samples:
                    damaged = quarantine.reason(sample)
                    assert damaged is not None  # this quarantine began empty
                    report(damaged)
                reader.skipped_samples = []
                if tokens is not None:
                    yield ref, tokens


def _cut_rows(documents: Iterator[Any], eos_id: int, seq_len: int) -> Iterator[NDArray[Any]]:
    """Rows of up to seq_len + 1 tokens. Each begins with the last token of the preceding row."""
    buffered: list[NDArray[Any]] = [np.array([eos_id], dtype=np.int32)]
    n_buffered = 1
    for document in documents:
        buffered.append(document)
        n_buffered += len(document)
        if n_buffered <= seq_len:
            continue
        tokens = np.concatenate(buffered)
        n_rows = (len(tokens) - 1) // seq_len
        for row in range(n_rows):
            yield tokens[row * seq_len : (row + 1) * seq_len + 1]
        buffered = [tokens[n_rows * seq_len :]]
        n_buffered = len(buffered[0])
    if n_buffered > 1:
        yield np.concatenate(buffered)
