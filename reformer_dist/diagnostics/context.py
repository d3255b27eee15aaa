"""Loss of the same tokens if they may look back only so far: what far context is worth to a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from reformer_dist.data import IGNORE_INDEX, Batch


def cut_rows(batches: Iterable[Batch], context: int, micro_batch: int) -> Iterator[Batch]:
    """Windows of `context` tokens of the rows of a language model, each half a window after the one before.

    Every label of a row counts once, in the window in which it looks back over half of the window or more, or over
    all of the row before it.
    """
    for batch in batches:
        windows = _windows(batch, context)
        tokens, labels = (torch.cat([window[i] for window in windows]) for i in (0, 1))
        for start in range(0, len(tokens), micro_batch):
            rows = slice(start, start + micro_batch)
            yield {"tokens": tokens[rows], "labels": labels[rows]}


def _windows(batch: Batch, context: int) -> list[tuple[Tensor, Tensor]]:
    tokens, labels = batch["tokens"], batch["labels"]
    n_tokens, stride = tokens.shape[1], max(1, context // 2)
    windows = []
    for start in range(0, max(1, n_tokens - context + stride), stride):
        stop = min(start + context, n_tokens)
        begin = max(0, stop - context)  # the last window is full too
        fresh = labels[:, begin:stop].clone()
        if start > 0:
            fresh[:, : start + context - stride - begin] = IGNORE_INDEX
        windows.append((tokens[:, begin:stop], fresh))
    return windows
