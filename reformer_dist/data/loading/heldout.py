"""Held-out batches, and the bytes of text by which their loss becomes bits per byte.

All held-out documents, in shard order, are one text that begins with an end-of-text token and is cut into
rows: every token of the split is predicted exactly once, so the bytes predicted are the bytes of the split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reformer_dist.data.format.corpus import Corpus
from reformer_dist.data.format.quarantine import CheckedReader, Damage, Quarantine
from reformer_dist.data.format.sample_reader import Sample, Source, sample_of
from reformer_dist.data.loading.collate import Batch, Example, Visit, collate, next_tokens
from reformer_dist.data.loading.packing import IGNORED_LABEL, Piece, TextRow
from reformer_dist.errors import DataError

HELDOUT = -1  # no stream of training has this number


@dataclass(frozen=True)
class EvalBatch:
    """Rows of held-out text; the end of the last and whole rows at the end may be padding."""

    tokens: torch.Tensor
    """int64 [micro_batch_size, seq_len + 1], padded with end-of-text."""
    labels: torch.Tensor
    """int64 [micro_batch_size, seq_len]: the token after each input, -100 where it is padding."""
    tensors: Batch
    """What the model is given."""

    @property
    def inputs(self) -> torch.Tensor:
        """int64 [micro_batch_size, seq_len]."""
        return self.tokens[:, :-1]


def heldout_batches(
    corpus: Corpus,
    *,
    seq_len: int,
    rows: int,
    micro_batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    max_damaged_share: float = 0.0,
    report: Callable[[Damage], None] = lambda damage: None,
    finish: Callable[[TextRow, Visit], Example] = lambda row, visit: next_tokens(row),
) -> Iterator[EvalBatch]:
    """The first `rows` rows of the held-out split (0: all of them), row i on rank i % dp_size.

    Every rank gets the same number of batches, since all must join the same collectives; what is missing is
    padding. A damaged sample is passed over and reported. `finish` makes of a row what the model is given. Raises
    DataError where nothing is held out, and while iterating where a shard is missing or more samples are damaged
    than may be.
    """
    n_rows = -(-corpus.total("tokens", "heldout") // seq_len)
    if n_rows == 0:
        raise DataError(f"{corpus.where}: no documents are held out; write it again with --heldout above 0")
    if rows > 0:
        n_rows = min(n_rows, rows)
    n_batches = -(-n_rows // (dp_size * micro_batch_size))
    quarantine = Quarantine(corpus.total("samples", "heldout"), max_damaged_share)
    documents = (piece.tokens for piece in _samples(corpus, quarantine, report))
    own = islice(_rows(documents, corpus, seq_len), dp_rank, n_rows, dp_size)

    def batch(first: int) -> EvalBatch:
        tokens, labels = _padded(list(islice(own, micro_batch_size)), corpus, seq_len, micro_batch_size)
        rows = [TextRow(*row) for row in zip(tokens, labels, strict=True)]
        made = [finish(row, (HELDOUT, dp_rank + (first + at) * dp_size, 0)) for at, row in enumerate(rows)]
        return EvalBatch(torch.from_numpy(tokens), torch.from_numpy(labels), collate(made))

    return (batch(number * micro_batch_size) for number in range(n_batches))


def split_samples(
    corpus: Corpus,
    *,
    split: str = "heldout",
    rows: int = 0,
    dp_rank: int = 0,
    dp_size: int = 1,
    max_damaged_share: float = 0.0,
    report: Callable[[Damage], None] = lambda damage: None,
) -> Iterator[Sample]:
    """Sample dp_rank of the first `rows` of a split (0: all of them), and every dp_size-th from there.

    A damaged sample is passed over and reported. Raises DataError while iterating where a shard is missing or more
    samples are damaged than may be.
    """
    quarantine = Quarantine(corpus.total("samples", split), max_damaged_share)
    found = islice(_samples(corpus, quarantine, report, split), dp_rank, rows or None, dp_size)
    return (sample_of(piece.source, piece.tokens) for piece in found)


def count_text_bytes(labels: torch.Tensor, token_bytes: NDArray[np.int64]) -> int:
    """Bytes of text that the labels stand for, those of -100 left out; `token_bytes` is the tokenizer's."""
    counted = labels[labels != IGNORED_LABEL]
    return int(torch.from_numpy(token_bytes).to(labels.device)[counted].sum())


def _samples(
    corpus: Corpus, quarantine: Quarantine, report: Callable[[Damage], None], split: str = "heldout"
) -> Iterator[Piece]:
    reader = CheckedReader(quarantine)
    with closing(reader):
        for part in corpus.parts(split):
            for entry in part.index.entries:
                source = Source(part.dataset, part.shard, entry)
                tokens = reader.open(part.number, source)
                for sample in reader.passed_over:
                    damage = quarantine.reason(sample)
                    assert damage is not None  # nothing was known of before
                    report(damage)
                reader.passed_over = []
                if tokens is not None:
                    yield Piece(part.number, source, 0, entry.n_tokens, tokens)


def _rows(documents: Iterator[Any], corpus: Corpus, seq_len: int) -> Iterator[NDArray[Any]]:
    """Rows of seq_len + 1 tokens that share one token with their neighbours; the last may be shorter."""
    held: list[NDArray[Any]] = [np.array([corpus.tokenizer.eos_id], dtype=np.int32)]
    n_held = 1
    for document in documents:
        held.append(document)
        n_held += len(document)
        if n_held <= seq_len:
            continue
        joined = np.concatenate(held)
        n_whole = (len(joined) - 1) // seq_len
        for row in range(n_whole):
            yield joined[row * seq_len : (row + 1) * seq_len + 1]
        held = [joined[n_whole * seq_len :]]
        n_held = len(held[0])
    if n_held > 1:
        yield np.concatenate(held)


def _padded(
    rows: list[NDArray[Any]], corpus: Corpus, seq_len: int, n_rows: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    tokens = np.full((n_rows, seq_len + 1), corpus.tokenizer.eos_id, dtype=np.int64)
    labels = np.full((n_rows, seq_len), IGNORED_LABEL, dtype=np.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        labels[index, : len(row) - 1] = row[1:]
    return tokens, labels
