"""Held-out loss without gradients: an exact mean over every token, whatever the ranks' shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from reformer_dist.distributed.runtime import Runtime
from reformer_dist.parallel import SlicedSequence
from reformer_dist.training.intake import IGNORED, MicroBatch
from reformer_dist.training.metrics import bits_per_byte


class Batch(Protocol):
    """Whole rows by the names that the model takes; labels are -100 where nothing is asked for."""

    @property
    def tensors(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class EvalResult:
    loss: float
    """Mean in nats per token."""
    bits_per_byte: float
    tokens: int
    text_bytes: int


@torch.no_grad()
def evaluate(
    forward: Callable[..., Tensor],
    batches: Iterable[Batch],
    token_bytes: Tensor,
    runtime: Runtime,
    sequence: SlicedSequence,
) -> EvalResult:
    """forward: ReformerLM's, the summed loss in nats; token_bytes [V]: bytes of text of each token id.

    The batches are of whole rows, alike on the ranks that share them by `sequence`.
    """
    nats, tokens, text_bytes = 0.0, 0, 0
    for batch in batches:
        rows = MicroBatch.of(batch.tensors, sequence)
        loss = forward(**rows.to(runtime.device), sequence=rows.sequence)
        labels = rows.tensors["labels"]
        counted = labels[labels != IGNORED]
        nats += loss.item()
        tokens += counted.numel()
        text_bytes += int(token_bytes[counted].sum())
    nats, n_tokens, n_bytes = runtime.sum([nats, tokens, text_bytes])
    return EvalResult(nats / max(1, n_tokens), bits_per_byte(nats, n_bytes), int(n_tokens), int(n_bytes))
