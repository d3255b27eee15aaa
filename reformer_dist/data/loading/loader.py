"""Training batches: the rows of each optimizer step that one data-parallel rank handles, read ahead.

Row v of a step comes from virtual stream v, whatever the number of ranks; a rank owns a run of streams. Each
thread reads some of them, and batches are put together in the order of the steps, so that neither ranks nor
threads nor reading ahead change what is in a step.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from reformer_dist.data.format.quarantine import CheckedReader, Damage, Quarantine, SampleId
from reformer_dist.data.loading.collate import Batch, Example, MakeExample, TextRows, collate
from reformer_dist.data.loading.packing import TokenStream
from reformer_dist.data.loading.sampler import Order
from reformer_dist.data.loading.state import Start, write_state

PREFETCH_STEPS = 2
WAIT = 0.1  # seconds between two looks at whether the loader is closed
CLOSING = 5.0  # seconds that a thread has to end; one that waits for a dead server is left behind


@dataclass(frozen=True)
class StepBatch:
    """A rank's rows of one optimizer step."""

    micro_batches: list[Batch]
    """Each of micro_batch_size rows; their labels are -100 where nothing is asked for. `rows`: their streams."""
    damaged: list[Damage]
    """Samples that were found damaged for the first time."""
    checksum: int
    """Of the ids of all that was read so far, 32 bits: equal on ranks that share sequences."""
    describe: Callable[[], dict[str, Any]]

    @property
    def state(self) -> dict[str, Any]:
        """The loader's state after this batch, as JSON values: a loader given it goes on with the next batch.

        To be asked for before the next batch is.
        """
        return self.describe()


@dataclass(frozen=True)
class _StreamRow:
    """A stream's row of one step, and where it stands behind it."""

    example: Example
    positions: list[int]
    digest: bytes
    passed_over: list[SampleId]


class TrainLoader:
    """An iterator of StepBatch, endless where the order is; threads read ahead.

    Rank r owns the r-th of `dp_size` equal runs of the order's streams. An error of a reading thread is raised by
    `next` for the step that it belongs to, and the loader is closed then.
    """

    def __init__(
        self,
        order: Order,
        quarantine: Quarantine,
        *,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start: Start | None = None,
        passes: int | None = None,
        make_example: MakeExample | None = None,
        workers: int = 1,
    ) -> None:
        """`passes`: over the order's one lane, after which there is only padding. `workers`: 0 reads in `next`.

        `make_example`: what becomes of what a row reads; if not given, rows of text for a language model.

        `quarantine` is given more by this loader, and holds what `start` knows. Raises ValueError where the
        batch doesn't divide.
        """
        n_rows, rest = divmod(order.n_streams, dp_size)
        if rest or n_rows % micro_batch_size:
            shares = f"{dp_size} ranks and micro-batches of {micro_batch_size}"
            raise ValueError(f"batch_size={order.n_streams} can't be divided into {shares}")
        start = start or Start()
        self._order, self._quarantine, self._origin = order, quarantine, start.origin
        self._micro_batch_size = micro_batch_size
        make_example = make_example or TextRows(order.seq_len, order.corpus.tokenizer.eos_id)
        self._owned = range(dp_rank * n_rows, (dp_rank + 1) * n_rows)
        self._step = start.step
        self._listed: set[SampleId] = set(start.quarantine)
        streams = {stream: start.open_stream(order, stream, passes) for stream in self._owned}
        n_readers = min(n_rows, max(1, workers))
        self._readers = [
            _Reader(
                order,
                {stream: streams[stream] for stream in self._owned[first::n_readers]},
                quarantine,
                step=start.step,
                make_example=make_example,
            )
            for first in range(n_readers)
        ]
        self._threads = [_Thread(reader) for reader in self._readers] if workers > 0 else []
        self._closed = False

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._closed:
            raise RuntimeError("the loader is closed")
        try:
            read: dict[int, _StreamRow] = {}
            for source in self._threads or self._readers:
                read.update(source.next_rows())
        except BaseException:
            # the streams stopped in the middle of a step: nothing that follows would be in order
            self.close()
            raise
        self._step += 1
        return self._batch([read[stream] for stream in self._owned])

    @property
    def n_damaged(self) -> int:
        """Samples in quarantine so far."""
        return len(self._listed)

    def learn(self, damages: Iterable[Damage]) -> None:
        """Takes samples that other ranks found damaged into quarantine. Raises DataError where it is full."""
        damages = list(damages)
        self._listed |= {damage.id for damage in damages}
        self._quarantine.add(damages)

    def close(self) -> None:
        """Stop the reading threads; the loader can't be used after it."""
        self._closed = True
        for thread in self._threads:
            thread.stop()
        for thread in self._threads:
            thread.join()
        if not self._threads:
            for reader in self._readers:
                reader.close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _batch(self, rows: list[_StreamRow]) -> StepBatch:
        # known by its number, since where a row stands among others depends on the ranks
        examples = [
            {**each.example, "rows": np.asarray(stream)} for stream, each in zip(self._owned, rows, strict=True)
        ]
        size = self._micro_batch_size
        if self._order.by_sample:
            # rows of a like length go together: a step is the same sum whatever rows a micro-batch holds
            examples.sort(key=lambda example: sum(map(np.size, example.values())))
        new = {sample for each in rows for sample in each.passed_over} - self._listed
        self._listed |= new
        found = [self._quarantine.reason(sample) for sample in sorted(new)]
        digests = hashlib.blake2b(b"".join(each.digest for each in rows), digest_size=4).digest()
        streams = {stream: (each.positions, each.digest) for stream, each in zip(self._owned, rows, strict=True)}
        step = self._step
        return StepBatch(
            micro_batches=[collate(examples[at : at + size]) for at in range(0, len(examples), size)],
            damaged=[damage for damage in found if damage is not None],
            checksum=int.from_bytes(digests, "little"),
            describe=lambda: write_state(self._order, step, self._origin, streams, self._listed),
        )


class _Reader:
    """Some streams of a rank, step by step."""

    def __init__(
        self,
        order: Order,
        streams: dict[int, TokenStream],
        quarantine: Quarantine,
        *,
        step: int,
        make_example: MakeExample,
    ) -> None:
        self._order, self._streams, self._step, self._make_example = order, streams, step, make_example
        self._samples = CheckedReader(quarantine)

    def next_rows(self) -> dict[int, _StreamRow]:
        """The next row of each stream."""
        lanes = self._order.lanes_of(self._step)
        self._step += 1
        return {number: self._read(number, int(lanes[number])) for number in self._streams}

    def close(self) -> None:
        self._samples.close()

    def _read(self, number: int, lane: int) -> _StreamRow:
        stream = self._streams[number]
        self._samples.passed_over = []
        visit = (number, lane, stream.positions[lane])
        example = self._make_example(stream.next_pieces(lane, self._samples.open), visit)
        return _StreamRow(example, list(stream.positions), stream.digest, self._samples.passed_over)


class _Thread:
    """Reads ahead with one reader, up to PREFETCH_STEPS steps; begins with the first step that is asked for."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self._ready: queue.Queue[dict[int, _StreamRow] | BaseException] = queue.Queue(PREFETCH_STEPS)
        self._is_stopped = threading.Event()
        # a daemon: one that is stuck in a file system that is gone must not keep the process from ending
        self._thread = threading.Thread(target=self._run, name="train-loader", daemon=True)

    def next_rows(self) -> dict[int, _StreamRow]:
        if self._thread.ident is None:
            self._thread.start()
        found = self._next()
        if isinstance(found, BaseException):
            raise found
        return found

    def _next(self) -> dict[int, _StreamRow] | BaseException:
        while not self._is_stopped.is_set():  # or else nobody puts any more
            with suppress(queue.Empty):
                return self._ready.get(timeout=WAIT)
        return RuntimeError("the loader is closed")

    def stop(self) -> None:
        self._is_stopped.set()
        with suppress(queue.Empty):
            while True:  # a thread that waits for room looks up at once
                self._ready.get_nowait()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join(CLOSING)

    def _run(self) -> None:
        try:
            while not self._is_stopped.is_set():
                self._put(self._reader.next_rows())
        except BaseException as error:
            self._put(error)
        finally:
            self._reader.close()

    def _put(self, rows: dict[int, _StreamRow] | BaseException) -> None:
        while not self._is_stopped.is_set():
            with suppress(queue.Full):
                self._ready.put(rows, timeout=WAIT)
                return
