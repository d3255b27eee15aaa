"""Examples, the arrays of one row, and their collation into batches of tensors for a model's forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reformer_dist.data.loading.packing import Span, pack_spans, positions_in_documents
from reformer_dist.data.loading.sampler import DrawKey
from reformer_dist.ops.cross_entropy import IGNORE_INDEX

Example = dict[str, NDArray[Any]]
"""Model inputs of one row by name, `labels` among them."""
Batch = dict[str, torch.Tensor]
"""Model inputs of several rows by name, [rows, ...]."""
MakeExample = Callable[[list[Span], DrawKey], Example]
"""Makes an example from the spans of a row. Without spans, at the end of a stream, all labels are IGNORE_INDEX."""

FILL_VALUES = {
    "labels": IGNORE_INDEX,
    "key_padding_mask": False,
    "source_mask": False,
    "document_ids": 2**31 - 1,  # a document of its own, after all others
}
"""Padding values for rows shorter than the longest of their batch, and of slices after the end of a row; 0 for
other names."""
LENGTH_MULTIPLE = 8


def next_token_example(tokens: NDArray[np.int64], labels: NDArray[np.int64]) -> Example:
    """Example of a causal language model from a row [seq_len + 1] and its labels [seq_len]."""
    return {"tokens": tokens[:-1], "labels": labels}


def next_token_examples(seq_len: int, eos_id: int, mask_document_starts: bool = False) -> MakeExample:
    """Returns a function that makes examples of packed text for a causal language model."""

    def make_example(spans: list[Span], draw_key: DrawKey) -> Example:
        return next_token_example(*pack_spans(spans, seq_len, eos_id, mask_document_starts))

    return make_example


def pack_examples(examples: Sequence[Example]) -> Example:
    """One row of several, [tokens] each, with the document ids and the positions of their tokens."""
    lengths = [len(example["tokens"]) for example in examples]
    documents = np.repeat(np.arange(len(examples), dtype=np.int32), lengths)
    packed = {name: np.concatenate([example[name] for example in examples]) for name in examples[0]}
    return {**packed, "document_ids": documents, "position_ids": positions_in_documents(documents)}


def collate(examples: Sequence[Example]) -> Batch:
    """Stacks examples. Rows of different lengths are padded to the longest, rounded up to LENGTH_MULTIPLE."""
    batch: Batch = {}
    for name in examples[0]:
        arrays = [example[name] for example in examples]
        if len({array.shape for array in arrays}) > 1:
            length = -(-max(len(array) for array in arrays) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
            fill = FILL_VALUES.get(name, 0)
            arrays = [np.pad(array, (0, length - len(array)), constant_values=fill) for array in arrays]
        batch[name] = torch.from_numpy(np.stack(arrays))
    return batch
