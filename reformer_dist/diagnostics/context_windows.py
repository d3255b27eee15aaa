"""Loss of the same tokens if they may look back only so far: what far context is worth to a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from reformer_dist.data import IGNORE_INDEX, Batch, positions_in_documents


def cut_rows(batches: Iterable[Batch], context: int, micro_batch: int) -> Iterator[Batch]:
    """Windows of `context` tokens of the rows of a language model, each half a window after the one before.

    Every label of a row counts once, in the window in which it looks back over half of the window or more, or over
    all of the row before it.
    """
    for batch in batches:
        windows = _windows(batch, context)
        cut = {name: torch.cat([window[name] for window in windows]) for name in batch}
        for start in range(0, len(cut["tokens"]), micro_batch):
            yield {name: x[start : start + micro_batch] for name, x in cut.items()}


def _windows(batch: Batch, context: int) -> list[Batch]:
    labels = batch["labels"]
    n_tokens, stride = labels.shape[1], max(1, context // 2)
    windows = []
    for start in range(0, max(1, n_tokens - context + stride), stride):
        stop = min(start + context, n_tokens)
        begin = max(0, stop - context)  # the last window is full too
        fresh = labels[:, begin:stop].clone()
        if start > 0:
            fresh[:, : start + context - stride - begin] = IGNORE_INDEX
        window = {**{name: x[:, begin:stop] for name, x in batch.items()}, "labels": fresh}
        if "position_ids" in batch:  # a window is a row of its own
            positions = positions_in_documents(window["document_ids"].numpy())
            window["position_ids"] = torch.from_numpy(positions)
        windows.append(window)
    return windows
