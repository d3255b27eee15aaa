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

from reformer_dist.data.batches import Batch
from reformer_dist.data.corpus import Corpus
from reformer_dist.data.quarantine import CheckedReader, Damage, Quarantine
from reformer_dist.data.samples import Source
from reformer_dist.data.streams import IGNORED_LABEL
from reformer_dist.errors import DataError


@dataclass(frozen=True)
class EvalBatch:
    """Rows of held-out text; the end of the last and whole rows at the end may be padding."""

    tokens: torch.Tensor
    """int64 [micro_batch_size, seq_len + 1], padded with end-of-text."""
    labels: torch.Tensor
    """int64 [micro_batch_size, seq_len]: the token after each input, -100 where it is padding."""

    @property
    def inputs(self) -> torch.Tensor:
        """int64 [micro_batch_size, seq_len]."""
        return self.tokens[:, :-1]

    @property
    def tensors(self) -> Batch:
        """What a language model is given."""
        return {"tokens": self.inputs, "labels": self.labels}


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
) -> Iterator[EvalBatch]:
    """The first `rows` rows of the held-out split (0: all of them), row i on rank i % dp_size.

    Every rank gets the same number of batches, since all must join the same collectives; what is missing is
    padding. A damaged sample is passed over and reported. Raises DataError where nothing is held out, and while
    iterating where a shard is missing or more samples are damaged than may be.
    """
    n_rows = -(-corpus.total("tokens", "heldout") // seq_len)
    if n_rows == 0:
        raise DataError(f"{corpus.where}: no documents are held out; write it again with --heldout above 0")
    if rows > 0:
        n_rows = min(n_rows, rows)
    n_batches = -(-n_rows // (dp_size * micro_batch_size))
    quarantine = Quarantine(corpus.total("samples", "heldout"), max_damaged_share)
    own = islice(_rows(_documents(corpus, quarantine, report), corpus, seq_len), dp_rank, n_rows, dp_size)
    return (
        _batch(list(islice(own, micro_batch_size)), corpus, seq_len, micro_batch_size) for _ in range(n_batches)
    )


def count_text_bytes(labels: torch.Tensor, token_bytes: NDArray[np.int64]) -> int:
    """Bytes of text that the labels stand for, those of -100 left out; `token_bytes` is the tokenizer's."""
    counted = labels[labels != IGNORED_LABEL]
    return int(torch.from_numpy(token_bytes).to(labels.device)[counted].sum())


def _documents(
    corpus: Corpus, quarantine: Quarantine, report: Callable[[Damage], None]
) -> Iterator[NDArray[np.int32]]:
    reader = CheckedReader(quarantine)
    with closing(reader):
        for part in corpus.parts("heldout"):
            for entry in part.index.entries:
                document = reader.open(part.number, Source(part.dataset, part.shard, entry))
                for sample in reader.passed_over:
                    damage = quarantine.reason(sample)
                    assert damage is not None  # nothing was known of before
                    report(damage)
                reader.passed_over = []
                if document is not None:
                    yield document


def _rows(documents: Iterator[NDArray[np.int32]], corpus: Corpus, seq_len: int) -> Iterator[NDArray[Any]]:
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


def _batch(rows: list[NDArray[Any]], corpus: Corpus, seq_len: int, micro_batch_size: int) -> EvalBatch:
    tokens = torch.full((micro_batch_size, seq_len + 1), corpus.tokenizer.eos_id, dtype=torch.int64)
    labels = torch.full((micro_batch_size, seq_len), IGNORED_LABEL, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids = torch.from_numpy(row.astype(np.int64))
        tokens[index, : len(ids)] = ids
        labels[index, : len(ids) - 1] = ids[1:]
    return EvalBatch(tokens, labels)
