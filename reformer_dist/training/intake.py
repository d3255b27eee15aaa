"""What comes in: a rank's slices of the rows of each step, read alike or refused alike by all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import DataError
from reformer_dist.parallel import SlicedSequence
from reformer_dist.training.evaluator import IGNORED


class StepBatch(Protocol):
    """A data-parallel rank's rows of one step."""

    @property
    def inputs(self) -> Tensor:
        """[n_micro, micro_batch, seq_len] int64."""
        ...

    @property
    def labels(self) -> Tensor:
        """[n_micro, micro_batch, seq_len] int64, -100 where there is nothing to predict."""
        ...

    @property
    def state(self) -> dict[str, Any]:
        """Where the loader stands behind this batch."""
        ...


@dataclass(frozen=True)
class Rows:
    """A rank's slices of its rows of a step, [n_micro, micro_batch, tokens at hand] each."""

    inputs: Tensor
    labels: Tensor
    valid_tokens: float
    """Labels of the step over all ranks, those of -100 left out."""
    state: dict[str, Any]


class Intake:
    """Every rank makes the same calls, since they agree on each step before they begin it."""

    def __init__(self, runtime: Runtime, sequence: SlicedSequence, batches: Iterator[StepBatch]) -> None:
        self._runtime, self._sequence, self._batches = runtime, sequence, batches

    def next_rows(self) -> Rows:
        """This rank's rows of the next step. Raises an error alike on every rank if any can't read its own."""
        batch, labels, error = None, None, None
        try:
            batch = next(self._batches)
            labels = self._slice(batch.labels, IGNORED)
        except (DataError, OSError) as caught:
            error = caught
        valid = 0 if labels is None else int((labels != IGNORED).sum())
        failed, valid_tokens = self._runtime.sum([float(error is not None), float(valid)])
        if failed:
            self._runtime.raise_together(error)
        assert batch is not None and labels is not None
        return Rows(self._slice(batch.inputs, 0), labels, valid_tokens, batch.state)

    def _slice(self, rows: Tensor, fill: int) -> Tensor:
        """[n_micro, micro_batch, seq_len] to [n_micro, micro_batch, tokens at hand]."""
        n_micro, n_rows, _ = rows.shape
        return self._sequence.take(rows.flatten(0, 1), fill).reshape(n_micro, n_rows, -1)
