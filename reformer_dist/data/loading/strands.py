"""Rows of DNA read from the other strand, as exact augmentation.

A row is a window of seq_len + 1 tokens, of which all but the first are labels. Its reverse complement is the same
window of the other strand, with end-of-text where a sequence begins and ends there: no base is invented or lost,
and the reverse complement of the reverse complement is the row itself.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.format.dna import reverse_complement_ids
from reformer_dist.data.loading.sampler import DrawKey
from reformer_dist.ops.cross_entropy import IGNORE_INDEX

TextRow = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(tokens [seq_len + 1], labels [seq_len])."""


def reverse_complement_row(row: TextRow, n_labels: int, mask_document_starts: bool, eos_id: int) -> TextRow:
    """The row of the other strand. n_labels: of the row, before its padding."""
    tokens, labels = np.full_like(row[0], eos_id), np.full_like(row[1], IGNORE_INDEX)
    window = reverse_complement_ids(row[0][: n_labels + 1])
    tokens[: n_labels + 1], labels[:n_labels] = window, window[1:]
    if mask_document_starts:
        labels[:n_labels][window[:-1] == eos_id] = IGNORE_INDEX
    return tokens, labels


def reverse_documents(
    ids: NDArray[np.int32], tokens: NDArray[np.int64], n_labels: int, eos_id: int
) -> NDArray[np.int32]:
    """Document ids [seq_len] of the reverse complement of a row, from those of the row.

    A document that is read from its other end ends with the end-of-text token before it.
    """
    index = np.arange(n_labels)
    found = np.where(tokens[:n_labels] == eos_id, ids[:n_labels], ids[np.maximum(index - 1, 0)])
    reverse = ids.copy()  # padding stays the last document
    reverse[:n_labels] = found.max(initial=0) - found[::-1]
    return reverse


def draws_reverse(seed: int, draw_key: DrawKey) -> bool:
    """Whether a row is read from the other strand, with probability 1/2: a function of its place in the order."""
    return bool(draw_key.bits(seed, "strand").random_raw() & 1)
