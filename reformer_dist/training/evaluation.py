"""Held-out loss without gradients: an exact mean over every token, whatever the ranks' shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from reformer_dist.distributed.runtime import Runtime
from reformer_dist.parallel import SlicedSequence
from reformer_dist.training.batches import MicroBatch
from reformer_dist.training.metrics import bits_per_byte


class Batch(Protocol):
    """Whole rows by the names that the model takes; labels are -100 where nothing is asked for."""

    @property
    def tensors(self) -> dict[str, Tensor]: ...


class Asked(Protocol):
    """What a task says of its labels."""

    reports_accuracy: ClassVar[bool]
    labels_per_row: ClassVar[bool]

    @property
    def token_bytes(self) -> Tensor | None:
        """[V]: bytes of text of each token id, where labels are tokens of text."""
        ...

    def predict(self, outputs: Any, sequence: SlicedSequence) -> Tensor:
        """What a model means that returned this without labels, of rows that are at hand as `sequence` says."""
        ...


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
    task: Asked,
    runtime: Runtime,
    sequence: SlicedSequence,
) -> EvalResult:
    """forward: a model's, the summed loss in nats.

    The batches are of whole rows, alike on the ranks that share them by `sequence`.
    """
    token_bytes = task.token_bytes
    nats, n_labels, text_bytes, n_right = 0.0, 0, 0, 0
    for batch in batches:
        rows = MicroBatch.of(batch.tensors, sequence, labels_per_row=task.labels_per_row)
        given = rows.to(runtime.device)
        nats += forward(**given, **rows.sequences).item()
        counted = rows.tensors["labels"][rows.asked]
        n_labels += counted.numel()
        if token_bytes is not None:
            text_bytes += int(token_bytes[counted].sum())
        if task.reports_accuracy:
            labels = given.pop("labels")
            said = task.predict(forward(**given, **rows.sequences), rows.sequences["sequence"])
            n_right += int(((said == labels) & rows.asked.to(runtime.device)).sum())
    nats, n_all, n_bytes, n_right_of_all = runtime.sum([nats, n_labels, text_bytes, n_right])
    return EvalResult(
        loss=nats / max(1, n_all),
        bits_per_byte=None if token_bytes is None else bits_per_byte(nats, n_bytes),
        accuracy=n_right_of_all / max(1, n_all) if task.reports_accuracy else None,
        labels=int(n_all),
        text_bytes=int(n_bytes),
    )
