"""Held-out loss without gradients: an exact mean over every token, whatever the ranks' shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

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
    """Mean in nats per label, which is a token or whatever else is asked for."""
    bits_per_byte: float | None
    """None where labels are no text."""
    accuracy: float | None
    """Share of labels that the model says; None where that is not looked at."""
    labels: int
    text_bytes: int

    def values(self) -> dict[str, float]:
        """What there is, by the name of its metric."""
        found = {"loss": self.loss, "bits_per_byte": self.bits_per_byte, "accuracy": self.accuracy}
        return {name: value for name, value in found.items() if value is not None}

    def __str__(self) -> str:
        return " | ".join(f"held-out {name.replace('_', ' ')} {each:.3f}" for name, each in self.values().items())


@torch.no_grad()
def evaluate(
    forward: Callable[..., Tensor],
    batches: Iterable[Batch],
    token_bytes: Tensor | None,
    runtime: Runtime,
    sequence: SlicedSequence,
    predict: Callable[[Any], Tensor] | None = None,
) -> EvalResult:
    """forward: a model's, the summed loss in nats; token_bytes [V]: bytes of text of each token id, where labels
    are tokens of text; predict: what a model means that returned this without labels, where accuracy is asked for.

    The batches are of whole rows, alike on the ranks that share them by `sequence`.
    """
    nats, n_labels, text_bytes, n_right = 0.0, 0, 0, 0
    for batch in batches:
        rows = MicroBatch.of(batch.tensors, sequence)
        given, labels = rows.to(runtime.device), rows.tensors["labels"]
        nats += forward(**given, **rows.sequences).item()
        counted = labels[labels != IGNORED]
        n_labels += counted.numel()
        if token_bytes is not None:
            text_bytes += int(token_bytes[counted].sum())
        if predict is not None:
            asked = given.pop("labels")
            n_right += int((predict(forward(**given, **rows.sequences)) == asked).sum())
    nats, n_all, n_bytes, n_right_of_all = runtime.sum([nats, n_labels, text_bytes, n_right])
    return EvalResult(
        loss=nats / max(1, n_all),
        bits_per_byte=None if token_bytes is None else bits_per_byte(nats, n_bytes),
        accuracy=None if predict is None else n_right_of_all / max(1, n_all),
        labels=int(n_all),
        text_bytes=int(n_bytes),
    )
