"""Held-out loss and accuracy: exact means over all labels, for any division of the rows over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.data import Batch
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.parallel import SlicedSequence
from reformer_dist.tasks import Task
from reformer_dist.training.batches import MicroBatch
from reformer_dist.training.metrics import bits_per_byte


@dataclass(frozen=True)
class EvalResult:
    loss: float
    """Mean in nats per label: per token, or per whatever else the task predicts."""
    bits_per_byte: float | None
    """None unless labels are tokens of text."""
    accuracy: float | None
    """Fraction of labels predicted correctly; None if the task does not report it."""
    n_labels: int
    text_bytes: int

    def values(self) -> dict[str, float]:
        """The metrics that are not None, by name."""
        metrics = {"loss": self.loss, "bits_per_byte": self.bits_per_byte, "accuracy": self.accuracy}
        return {name: value for name, value in metrics.items() if value is not None}

    def __str__(self) -> str:
        values = self.values().items()
        return " | ".join(f"held-out {name.replace('_', ' ')} {value:.3f}" for name, value in values)


@torch.no_grad()
def evaluate(
    forward: Callable[..., Tensor],
    batches: Iterable[Batch],
    task: Task,
    runtime: Runtime,
    sequence: SlicedSequence,
) -> EvalResult:
    """Evaluates a model's forward, which returns the summed loss in nats.

    batches: whole rows, equal on the ranks that share them by `sequence`.
    """
    token_bytes = task.token_bytes
    nats, n_labels, text_bytes, n_correct = 0.0, 0, 0, 0
    for rows in batches:
        batch = MicroBatch.from_rows(rows, sequence, labels_per_row=task.labels_per_row)
        inputs = batch.to(runtime.device)
        nats += forward(**inputs, **batch.sequences).item()
        counted = batch.tensors["labels"][batch.label_mask]
        n_labels += counted.numel()
        if token_bytes is not None:
            text_bytes += int(token_bytes[counted].sum())
        if task.reports_accuracy:
            labels = inputs.pop("labels")
            predicted = task.predict(forward(**inputs, **batch.sequences), batch.sequences["sequence"])
            n_correct += int(((predicted == labels) & batch.label_mask.to(runtime.device)).sum())
    nats, total_labels, total_bytes, total_correct = runtime.sum([nats, n_labels, text_bytes, n_correct])
    return EvalResult(
        loss=nats / max(1, total_labels),
        bits_per_byte=None if token_bytes is None else bits_per_byte(nats, total_bytes),
        accuracy=total_correct / max(1, total_labels) if task.reports_accuracy else None,
        n_labels=int(total_labels),
        text_bytes=int(total_bytes),
    )
