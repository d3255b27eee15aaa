"""Rows as named arrays, and what becomes of several: a batch of named tensors, as a model's forward takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reformer_dist.data.loading.packing import IGNORED_LABEL, Piece, TextRow, make_row

Example = dict[str, NDArray[Any]]
"""What a model is given of one row, by name; `labels` is among it."""
Batch = dict[str, torch.Tensor]
"""The same of several rows, [rows, ...]."""
Visit = tuple[int, int, int]
"""What a row's randomness may depend on, the same in any world: stream, lane, and place in it."""
MakeExample = Callable[[list[Piece], Visit], Example]
"""From what a row reads; nothing at all where its stream has ended, which asks for nothing then."""

FILLS = {"labels": IGNORED_LABEL, "key_padding_mask": False, "source_mask": False}
"""What stands behind the end of a row that is shorter than others; 0 for all that is not named."""
LENGTH_STEP = 8


@dataclass(frozen=True)
class TextRows:
    """Rows of packed text, as a language model is given them."""

    seq_len: int
    eos_id: int
    mask_document_starts: bool = False
    finish: Callable[[TextRow, Visit], Example] | None = None
    """What a model that is asked for something else is given."""

    def __call__(self, pieces: list[Piece], visit: Visit) -> Example:
        row = make_row(pieces, self.seq_len, self.eos_id, self.mask_document_starts)
        return self.finish(row, visit) if self.finish else next_tokens(row)


def next_tokens(row: TextRow) -> Example:
    """Each token is to be predicted from those before it."""
    return {"tokens": row.tokens[:-1], "labels": row.labels}


def collate(examples: Sequence[Example]) -> Batch:
    """Rows of one batch; where lengths differ, to the longest, rounded up to a multiple of LENGTH_STEP."""
    return {name: _stack([each[name] for each in examples], FILLS.get(name, 0)) for name in examples[0]}


def _stack(arrays: list[NDArray[Any]], fill: int) -> torch.Tensor:
    if len({array.shape for array in arrays}) > 1:
        longest = -(-max(len(array) for array in arrays) // LENGTH_STEP) * LENGTH_STEP
        arrays = [np.pad(array, (0, longest - len(array)), constant_values=fill) for array in arrays]
    return torch.from_numpy(np.stack(arrays))
