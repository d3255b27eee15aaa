"""Parts of a step, marked in the traces of `torch.profiler`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

PREFIX = "reformer: "
"""Begins the names of the marks."""
STEP = "step"
PARTS = {
    "data": "waiting for the rows of the step",
    "embedding": "token and position embeddings",
    "projections": "queries, keys, values and outputs of attention, with their norm",
    "hash": "bucket ids",
    "sort": "order of the buckets",
    "exchange": "rows sent to and received from the ranks that share a sequence",
    "attend": "attention within the buckets",
    "feed-forward": "with its norm",
    "loss": "the head and the loss",
    "optimizer": "clipping and update, with ZeRO's collectives",
    "forward": "the rest of forward, such as residuals",
    "backward": "the rest of backward, such as residuals, sums and the reduction of gradients",
}
"""Names of the parts, and what they are."""


def part(name: str) -> AbstractContextManager[object]:
    """Marks the block as one of PARTS, without the parts within it. Costs nothing unless a profiler runs."""
    # a mark takes 10 microseconds even if nothing records it
    is_recorded = torch.autograd.profiler._is_profiler_enabled
    return torch.profiler.record_function(f"{PREFIX}{name}") if is_recorded else nullcontext()
