"""Training batches: each rank's slices of a step's rows. All ranks agree on errors and damaged samples."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from reformer_dist.data import FILL_VALUES, DamagedSample, StepBatch, TrainLoader
from reformer_dist.distributed.runtime import Preempted, Runtime, SharedError
from reformer_dist.errors import DataError, UserError
from reformer_dist.ops.cross_entropy import IGNORE_INDEX
from reformer_dist.parallel import SlicedSequence
from reformer_dist.training.preemption import StopSignal

T = TypeVar("T")
SOURCE_INPUTS = ("source", "source_mask")
POLL_SECONDS = 0.2  # interval at which the stop signal is checked while waiting for data


@dataclass(frozen=True)
class MicroBatch:
    """This rank's slices of some rows: the inputs of one forward."""

    tensors: dict[str, Tensor]
    """[rows, local tokens] each, or [rows] where a label is per row."""
    sequences: dict[str, SlicedSequence]
    """Position of the slices in the rows, and in their sources, by the names that the model's forward takes."""
    labels_per_row: bool = False
    """Whether labels are per row, equal on all ranks that share it, rather than per token."""

    @classmethod
    def from_rows(
        cls, rows: Mapping[str, Tensor], sequence: SlicedSequence, *, labels_per_row: bool = False
    ) -> MicroBatch:
        """Slices whole rows, which are equal on the ranks that share them by `sequence`."""
        tensors, tokens = dict(rows), rows["tokens"]
        sequences = {"sequence": sequence.of_length(tokens.shape[1])}
        if "source" in rows:
            sequences["source_sequence"] = sequence.of_length(rows["source"].shape[1])
        if sequence.mesh.size > 1:
            for name, tensor in rows.items():
                if name == "rows" or (name == "labels" and labels_per_row):
                    continue
                sliced = sequences["source_sequence" if name in SOURCE_INPUTS else "sequence"]
                tensors[name] = sliced.take(tensor, FILL_VALUES.get(name, 0))
        mask = sequences["sequence"].key_padding_mask(len(tokens), tokens.device)
        if mask is not None:
            tensors.setdefault("key_padding_mask", mask)
        return cls(tensors, sequences, labels_per_row)

    @property
    def label_mask(self) -> Tensor:
        """Labels that this rank counts; labels per row are counted by the first of the ranks that share them."""
        mask = self.tensors["labels"] != IGNORE_INDEX
        is_first = self.sequences["sequence"].mesh.slice_index == 0
        return mask if is_first or not self.labels_per_row else torch.zeros_like(mask)

    @property
    def n_labels(self) -> int:
        return int(self.label_mask.sum())

    def to(self, device: torch.device) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class StepInputs:
    """This rank's micro-batches of a step."""

    micro_batches: list[MicroBatch]
    n_labels: float
    """Labels of the step over all ranks, without ignored ones; 1 if damage left only padding."""
    batch: StepBatch

    @property
    def data_state(self) -> dict[str, Any]:
        """The loader's state after this step, as JSON values; valid until the next step is read."""
        return self.batch.state


class BatchReader:
    """Reads the inputs of each step. Every rank makes the same calls, since each step is agreed on by all."""

    def __init__(
        self,
        runtime: Runtime,
        sequence: SlicedSequence,
        loader: TrainLoader,
        report_damaged: Callable[[list[DamagedSample]], None] = lambda damaged: None,
        stop: StopSignal | None = None,
        *,
        labels_per_row: bool = False,
    ) -> None:
        """report_damaged: called on rank 0 with the samples that any rank found damaged."""
        self._runtime, self._sequence, self._loader = runtime, sequence, loader
        self._report_damaged, self._stop = report_damaged, stop or StopSignal()
        self._labels_per_row = labels_per_row

    @property
    def initial_state(self) -> dict[str, Any]:
        """The loader's state before the first step that this object reads."""
        return self._loader.initial_state

    @property
    def n_damaged(self) -> int:
        """Number of damaged samples so far, on all ranks."""
        return self._loader.n_damaged

    def next_step(self) -> StepInputs:
        """This rank's inputs of the next step.

        Raises the same exception on every rank: Preempted if any received a stop signal, SharedError if any can't
        read its rows or if ranks that share sequences read different ones.
        """
        batch, micro_batches, error = None, [], None
        try:
            batch = wait_for(lambda: next(self._loader), self._stop)
            if batch is not None:
                micro_batches = [
                    MicroBatch.from_rows(rows, self._sequence, labels_per_row=self._labels_per_row)
                    for rows in batch.batches
                ]
        except (DataError, OSError) as raised:
            error = raised
        n_labels = sum(micro_batch.n_labels for micro_batch in micro_batches)
        n_damaged, difference = (len(batch.damaged), self._signed_checksum(batch.checksum)) if batch else (0, 0)
        local = [error is not None, self._stop.is_set, n_labels, n_damaged, difference]
        failed, stopped, n_labels_total, n_damaged_total, differs = self._runtime.sum([*map(float, local)])
        if stopped:
            raise Preempted("stopped by a signal")
        if failed:
            self._runtime.raise_together(error)
        assert batch is not None
        if differs:
            raise SharedError("ranks that share sequences read different rows; compare their copies of the data")
        if n_damaged_total:
            self._share_damaged(batch.damaged)
        return StepInputs(micro_batches, max(1.0, n_labels_total), batch)

    def _signed_checksum(self, checksum: int) -> int:
        """A multiple of the checksum that sums to 0 over the ranks of a sequence if all read the same rows."""
        mesh = self._sequence.mesh
        return checksum * (mesh.size - 1 if mesh.slice_index == 0 else -1) if mesh.size > 1 else 0

    def _share_damaged(self, local: Sequence[DamagedSample]) -> None:
        """Quarantines the damaged samples of all ranks on every rank. Raises on all if there are too many."""
        by_name = {str(sample): sample for samples in self._runtime.gather(list(local)) for sample in samples}
        damaged = [by_name[name] for name in sorted(by_name)]
        self._runtime.on_main(lambda: self._report_damaged(damaged))
        self._runtime.together(lambda: self._loader.add_damaged(damaged))


def wait_for(read: Callable[[], T], stop: StopSignal) -> T | None:
    """Reads in another thread; returns None if this process receives a stop signal first."""
    pending = _in_background(read)
    while not stop.is_set:
        if wait([pending], timeout=POLL_SECONDS).done:
            return pending.result()
    return None


def interruptible(items: Iterable[T], stop: StopSignal) -> Iterator[T]:
    """The items, read in another thread, up to a stop signal."""
    source = iter(items)
    while True:
        item = wait_for(lambda: list(islice(source, 1)), stop)
        if item is None:
            raise UserError("stopped by a signal")
        if not item:
            return
        yield item[0]


def _in_background(read: Callable[[], T]) -> Future[T]:
    """Reads in a daemon thread, so that an unresponsive data source does not keep the process alive."""
    pending: Future[T] = Future()

    def run() -> None:
        try:
            pending.set_result(read())
        except BaseException as error:
            pending.set_exception(error)

    threading.Thread(target=run, name="batch-reader", daemon=True).start()
    return pending
