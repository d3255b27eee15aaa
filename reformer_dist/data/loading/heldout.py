"""Held-out batches, and the bytes of text that convert their loss to bits per byte.

The documents of the held-out split, in shard order, form one text that begins with an end-of-text token and is
cut into rows. Every token of the split is in exactly one row, so the bytes predicted by all rows are those of
the split. An evaluation of fewer rows takes them at equal distances: the first rows would judge a split that is
in the order of its sources by one source alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from reformer_dist.data.format.corpus import Corpus
from reformer_dist.data.format.quarantine import CheckedReader, DamagedSample, Quarantine
from reformer_dist.data.format.sample_reader import Sample, make_sample
from reformer_dist.data.loading.collate import Batch, Example, MakeExample, collate, next_token_examples
from reformer_dist.data.loading.cut import Cut, StreamPart
from reformer_dist.data.loading.packing import Span, StreamIndex
from reformer_dist.data.loading.sampler import DrawKey, Pool
from reformer_dist.errors import DataError
from reformer_dist.ops.cross_entropy import IGNORE_INDEX

Report = Callable[[DamagedSample], None]


@dataclass(frozen=True)
class RowSelection:
    """The rows of a split to evaluate, spread evenly over it, and the data-parallel rank that asks.

    The selection is the same for any number of ranks: rank r of n evaluates its rows r, r + n, r + 2n, ...
    """

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

    def numbers(self, available: int) -> Iterator[int]:
        """Numbers of the rows of all ranks, ascending, among the `available` rows of the split."""
        n_rows = self.n_rows(available)
        return (available * i // n_rows for i in range(n_rows))

    def describe(self, available: int) -> str:
        """For logs: 64 of 54,929 rows."""
        return f"{self.n_rows(available):,} of {available:,} rows"


def count_rows(corpus: Corpus, split: str, seq_len: int | None) -> int:
    """Rows of a split: of packed text in rows of seq_len tokens or, if it is None, of one sample each."""
    return corpus.total("samples", split) if seq_len is None else -(-corpus.total("tokens", split) // seq_len)


def heldout_text_batches(
    corpus: Corpus,
    rows: RowSelection,
    *,
    seq_len: int,
    report: Report = lambda sample: None,
    make_example: MakeExample | None = None,
) -> Iterator[Batch]:
    """Batches of held-out text. Every rank gets the same number, the last ones filled with rows of padding.

    make_example: by default, rows for a causal language model. Damaged samples are skipped and reported. Raises
    DataError if nothing is held out and, while iterating, if a shard is missing or too many samples are damaged.
    """
    if corpus.total("text_bytes", "heldout") == 0:
        raise DataError(f"{corpus.where}: no documents are held out; write it again with --heldout above 0")
    n_rows = count_rows(corpus, "heldout", seq_len)
    found = _read_rows(corpus, rows, report, seq_len)
    make = make_example or next_token_examples(seq_len, corpus.tokenizer.eos_id)

    def next_example() -> Example:
        number, spans = next(found, (n_rows, []))
        return make(spans, DrawKey.heldout(number))

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
    n_rows = count_rows(corpus, rows.split, None)
    if n_rows == 0:
        raise DataError(f"{corpus.where}: no samples are held out; write it again with --heldout-from")
    found = _read_rows(corpus, rows, report)

    def next_example() -> Example:
        number, spans = next(found, (n_rows, []))
        return make_example(make_sample(spans[0].ref, spans[0].tokens) if spans else None, DrawKey.heldout(number))

    return _batches(next_example, rows, n_rows)


def read_split(corpus: Corpus, rows: RowSelection, *, report: Report = lambda sample: None) -> Iterator[Sample]:
    """The samples that a rank evaluates. Damaged ones are skipped and reported.

    Raises DataError while iterating if a shard is missing or too many samples are damaged.
    """
    return (make_sample(span.ref, span.tokens) for _, [span] in _read_rows(corpus, rows, report))


def count_text_bytes(labels: torch.Tensor, token_bytes: NDArray[np.int64]) -> int:
    """Bytes of text of all labels but IGNORE_INDEX. token_bytes: the tokenizer's, [vocab_size]."""
    predicted = labels[labels != IGNORE_INDEX]
    return int(torch.from_numpy(token_bytes).to(labels.device)[predicted].sum())


def _batches(next_example: Callable[[], Example], rows: RowSelection, available: int) -> Iterator[Batch]:
    # the same number on each rank, since all take part in the same collectives
    n_batches = -(-rows.n_rows(available) // (rows.dp_size * rows.micro_batch_size))
    return (collate([next_example() for _ in range(rows.micro_batch_size)]) for _ in range(n_batches))


def _read_rows(
    corpus: Corpus, rows: RowSelection, report: Report, seq_len: int | None = None
) -> Iterator[tuple[int, list[Span]]]:
    """(row number, spans) of each row of a rank, without rows whose samples are all damaged.

    Each rank reads the rows of all, so that all find the same samples damaged and raise the same errors.
    """
    return islice(_read_all_rows(corpus, rows, report, seq_len), rows.dp_rank, None, rows.dp_size)


def _read_all_rows(
    corpus: Corpus, rows: RowSelection, report: Report, seq_len: int | None
) -> Iterator[tuple[int, list[Span]]]:
    by_sample, length = seq_len is None, seq_len or 1
    pool = Pool(0, corpus.shards(rows.split), seed=0, n_streams=1, shuffle=False, by_sample=by_sample)
    index = StreamIndex(pool, StreamPart(Cut(), pool.n_units, 0, 1), stream=0, passes=1)
    quarantine = Quarantine(corpus.total("samples", rows.split), rows.max_damaged_fraction)
    reported: set[DamagedSample] = set()
    with closing(CheckedReader(quarantine)) as reader:
        for number in rows.numbers(count_rows(corpus, rows.split, seq_len)):
            spans: list[Span] = []
            position, end = number * length, min((number + 1) * length, pool.n_units)
            while position < end:
                span, advance = index.span_at(position, end - position, reader.open)
                position += advance
                spans += [] if span is None else [span]
            for sample in reader.skipped_samples:
                damaged = quarantine.reason(sample)
                assert damaged is not None  # this quarantine began empty
                if damaged not in reported:  # a long sample is met in several rows
                    report(damaged)
                    reported.add(damaged)
            reader.skipped_samples = []
            if spans:
                yield number, spans
