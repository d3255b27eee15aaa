"""Held-out loss and accuracy: exact means over all labels, for any division of the rows over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reformer_dist.data import Batch, positions_in_documents
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.parallel import SlicedSequence
from reformer_dist.process.live_line import live
from reformer_dist.tasks import Task
from reformer_dist.training.batches import MicroBatch
from reformer_dist.training.metrics import bits_per_byte
from reformer_dist.training.positions import PositionLoss, PositionSums


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
    positions: list[PositionLoss] = field(default_factory=list)
    """By the position of the labels in their rows; empty unless asked for."""

    def values(self) -> dict[str, float]:
        """The metrics that are not None, by name."""
        metrics = {"loss": self.loss, "bits_per_byte": self.bits_per_byte, "accuracy": self.accuracy}
        return {name: value for name, value in metrics.items() if value is not None}

    def position_values(self) -> dict[str, float]:
        """The loss at each octave of positions, in bits per byte if labels are tokens of text, by its name."""
        parts = ((each.name, each.loss, each.bits_per_byte) for each in self.positions)
        return {name: loss if bits is None else bits for name, loss, bits in parts}

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
    *,
    by_position: bool = False,
) -> EvalResult:
    """Evaluates a model's forward, which returns the summed loss in nats.

    batches: whole rows, equal on the ranks that share them by `sequence`. by_position: also breaks the loss down
    by position, for the forward of a language model.
    """
    token_bytes = task.token_bytes
    nats, n_labels, text_bytes, n_correct = 0.0, 0, 0, 0
    positions = PositionSums(token_bytes)
    for rows in live.counted(batches, "batches"):
        batch = MicroBatch.from_rows(rows, sequence, labels_per_row=task.labels_per_row)
        inputs = batch.to(runtime.device)
        if by_position:
            losses = forward(**inputs, **batch.sequences, per_token_loss=True).cpu()
            places = _positions(rows, batch.sequences["sequence"], losses)
            positions.add(losses, batch.tensors["labels"], batch.label_mask, places)
            nats += losses.sum(dtype=torch.float64).item()
        else:
            nats += forward(**inputs, **batch.sequences).item()
        counted = batch.tensors["labels"][batch.label_mask]
        n_labels += counted.numel()
        if token_bytes is not None:
            text_bytes += int(token_bytes[counted].sum())
        if task.reports_accuracy:
            labels = inputs.pop("labels")
            predicted = task.predict(forward(**inputs, **batch.sequences), batch.sequences["sequence"])
            n_correct += int(((predicted == labels) & batch.label_mask.to(runtime.device)).sum())
    totals = [nats, n_labels, text_bytes, n_correct, *positions.sums.flatten().tolist()]
    nats, total_labels, total_bytes, total_correct, *position_sums = runtime.sum(totals)
    return EvalResult(
        loss=nats / max(1, total_labels),
        bits_per_byte=None if token_bytes is None else bits_per_byte(nats, total_bytes),
        accuracy=total_correct / max(1, total_labels) if task.reports_accuracy else None,
        n_labels=int(total_labels),
        text_bytes=int(total_bytes),
        positions=positions.result(position_sums),
    )


def _positions(rows: Batch, sequence: SlicedSequence, losses: Tensor) -> Tensor:
    """Positions of this rank's losses [B, S] in their rows, or in their documents if these are apart."""
    if "document_ids" not in rows:
        return sequence.positions(losses.shape[1], losses.device)
    return sequence.take(torch.from_numpy(positions_in_documents(rows["document_ids"].numpy())), 0)
