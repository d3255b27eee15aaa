"""What comes in: a rank's slices of the rows of each step, read alike or refused alike by all ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from reformer_dist.distributed.runtime import Preempted, Runtime, SharedError
from reformer_dist.errors import DataError
from reformer_dist.parallel import SlicedSequence
from reformer_dist.training.preemption import StopSignal

IGNORE_INDEX = -100
OF_SOURCE = ("source", "source_mask")
FILLS = {"labels": IGNORE_INDEX}
"""What a slice holds where the row has ended; 0 for all that is not named."""
LOOK_UP = 0.2  # seconds between two looks at the stop signal, while data is waited for


class StepBatch(Protocol):
    """A data-parallel rank's rows of one step."""

    @property
    def micro_batches(self) -> list[dict[str, Tensor]]:
        """Whole rows by the names that the model takes; labels are -100 where nothing is asked for.

        `rows` numbers them among those of their step.
        """
        ...

    @property
    def checksum(self) -> int:
        """32 bits of all that was read so far, equal on ranks that share sequences."""
        ...

    @property
    def damaged(self) -> Sequence[Any]:
        """Samples that were found damaged for the first time; each says so as a string."""
        ...

    @property
    def state(self) -> dict[str, Any]:
        """Where the loader stands behind this batch; asked for before the next batch is."""
        ...


class Batches(Protocol):
    """The loader."""

    @property
    def n_damaged(self) -> int: ...

    def __next__(self) -> StepBatch: ...

    def add_damaged(self, damages: Iterable[Any]) -> None:
        """Passes over samples that any rank found damaged. Raises DataError where there are too many."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """This rank's slices of some rows: what the model's forward is given."""

    tensors: dict[str, Tensor]
    """[rows, tokens at hand] each, or without tokens where there is one answer to a row."""
    sequences: dict[str, SlicedSequence]
    """By the names that the model takes: which part of the rows is at hand, and of their sources."""
    labels_per_row: bool = False
    """Whether labels are of whole rows, and the same on all ranks that share them; else they are of tokens."""

    @classmethod
    def of(
        cls, rows: Mapping[str, Tensor], sequence: SlicedSequence, *, labels_per_row: bool = False
    ) -> MicroBatch:
        """rows: whole ones, alike on the ranks that share them by `sequence`."""
        tensors, tokens = dict(rows), rows["tokens"]
        sequences = {"sequence": sequence.of_length(tokens.shape[1])}
        if "source" in rows:
            sequences["source_sequence"] = sequence.of_length(rows["source"].shape[1])
        if sequence.mesh.size > 1:
            for name, tensor in rows.items():
                if name == "rows" or (name == "labels" and labels_per_row):
                    continue
                shared = sequences["source_sequence" if name in OF_SOURCE else "sequence"]
                tensors[name] = shared.take(tensor, FILLS.get(name, 0))
        mask = sequences["sequence"].key_padding_mask(len(tokens), tokens.device)
        if mask is not None:
            tensors.setdefault("key_padding_mask", mask)
        return cls(tensors, sequences, labels_per_row)

    @property
    def asked(self) -> Tensor:
        """Which labels count on this rank: of those that several ranks have, the first rank's."""
        asked = self.tensors["labels"] != IGNORE_INDEX
        is_first = self.sequences["sequence"].mesh.slice_index == 0
        return asked if is_first or not self.labels_per_row else torch.zeros_like(asked)

    @property
    def valid_labels(self) -> int:
        return int(self.asked.sum())

    def to(self, device: torch.device) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Rows:
    """A rank's part of a step."""

    micro_batches: list[MicroBatch]
    valid_labels: float
    """Labels of the step over all ranks, those of -100 left out; 1 where damage has left nothing but padding."""
    batch: StepBatch

    @property
    def state(self) -> dict[str, Any]:
        """Where the loader stands behind these rows, as JSON values; asked for before the next rows are."""
        return self.batch.state


class BatchReader:
    """Every rank makes the same calls, since they agree on each step before they begin it."""

    def __init__(
        self,
        runtime: Runtime,
        sequence: SlicedSequence,
        batches: Batches,
        report: Callable[[list[Any]], None] = lambda damaged: None,
        stop: StopSignal | None = None,
        *,
        labels_per_row: bool = False,
    ) -> None:
        """report: told on rank 0 of the samples that any rank found damaged; labels_per_row: see `MicroBatch`."""
        self._runtime, self._sequence, self._batches, self._report = runtime, sequence, batches, report
        self._stop, self._labels_of_rows = stop or StopSignal(), labels_per_row

    @property
    def n_damaged(self) -> int:
        """Samples that were found damaged so far, on all ranks."""
        return self._batches.n_damaged

    def next_rows(self) -> Rows:
        """This rank's rows of the next step.

        Raises alike on every rank: Preempted if any was told to stop, an error if any can't read its rows.
        """
        batch, micro_batches, error = None, [], None
        try:
            batch = self._wait_for(_in_background(lambda: next(self._batches)))
            if batch is not None:
                micro_batches = [self._take(rows) for rows in batch.micro_batches]
        except (DataError, OSError) as caught:
            error = caught
        valid = sum(each.valid_labels for each in micro_batches)
        n_damaged, odds = (len(batch.damaged), self._odds(batch.checksum)) if batch is not None else (0, 0)
        mine = [error is not None, self._stop.is_set, valid, n_damaged, odds]
        failed, stopped, valid_labels, n_damaged_of_all, odds_of_all = self._runtime.sum([*map(float, mine)])
        if stopped:
            raise Preempted("told to stop")
        if failed:
            self._runtime.raise_together(error)
        assert batch is not None
        if odds_of_all:
            raise SharedError("ranks that share sequences read different rows; compare their copies of the data")
        if n_damaged_of_all:
            self._share_damage(batch.damaged)
        return Rows(micro_batches, max(1.0, valid_labels), batch)

    def _take(self, rows: Mapping[str, Tensor]) -> MicroBatch:
        return MicroBatch.of(rows, self._sequence, labels_per_row=self._labels_of_rows)

    def _odds(self, checksum: int) -> int:
        """What sums to 0 over the ranks that share a sequence if they read the same, and to chance if not."""
        mesh = self._sequence.mesh
        return checksum * (mesh.size - 1 if mesh.slice_index == 0 else -1) if mesh.size > 1 else 0

    def _share_damage(self, mine: Sequence[Any]) -> None:
        """Every rank learns of what any rank found. Raises an error alike on all of them if that is too much."""
        found = {str(each): each for of_rank in self._runtime.gather(list(mine)) for each in of_rank}
        damaged = [found[words] for words in sorted(found)]
        self._runtime.on_main(lambda: self._report(damaged))
        self._runtime.together(lambda: self._batches.add_damaged(damaged))

    def _wait_for(self, coming: Future[StepBatch]) -> StepBatch | None:
        """The batch, or None if this process is told to stop before it comes."""
        while not self._stop.is_set:
            if wait([coming], timeout=LOOK_UP).done:
                return coming.result()
        return None


def _in_background(read: Callable[[], StepBatch]) -> Future[StepBatch]:
    """By a thread that may wait for a source which never answers, and yet lets the process end."""
    coming: Future[StepBatch] = Future()

    def run() -> None:
        try:
            coming.set_result(read())
        except BaseException as error:
            coming.set_exception(error)

    threading.Thread(target=run, name="intake", daemon=True).start()
    return coming
