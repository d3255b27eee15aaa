"""Training batches: the rows of each optimizer step of one data-parallel rank, read ahead by threads.

Row v of a step comes from virtual stream v for any number of ranks, and each rank owns a contiguous range of
streams, divided among its threads. Batches are assembled in step order, so a step contains the same rows for any
number of ranks, threads and prefetched steps.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from reformer_dist.data.format.quarantine import CheckedReader, DamagedSample, Quarantine, SampleId
from reformer_dist.data.loading.collate import Batch, Example, MakeExample, collate, next_token_examples
from reformer_dist.data.loading.loader_state import LoaderState
from reformer_dist.data.loading.packing import TokenStream
from reformer_dist.data.loading.sampler import DrawKey, Sampler

PREFETCH_STEPS = 2
POLL_SECONDS = 0.1  # between checks of whether the loader is closed
JOIN_SECONDS = 5.0  # for a thread to end; one that waits for an unresponsive server is abandoned


@dataclass(frozen=True)
class StepBatch:
    """Rows of one optimizer step of a data-parallel rank."""

    batches: list[Batch]
    """Each of micro_batch_size rows. Labels are IGNORE_INDEX where there is no loss. `rows` are the streams, which
    are the rows of the global step."""
    damaged: list[DamagedSample]
    """Samples found to be damaged in this step."""
    checksum: int
    """32-bit hash of the ids of everything read so far, equal on all ranks of a sequence-parallel group."""
    make_state: Callable[[], dict[str, Any]]
    samples: dict[int, list[str]]
    """Ids of the spans of each row, by stream."""

    @property
    def state(self) -> dict[str, Any]:
        """The loader's state after this batch, as JSON values. A resumed loader continues with the next batch.

        Valid until the next batch is requested.
        """
        return self.make_state()


@dataclass(frozen=True)
class _StreamRow:
    """A stream's row of one step, and the state of the stream after it."""

    example: Example
    positions: list[int]
    digest: bytes
    skipped_samples: list[SampleId]
    samples: list[str]
    """Ids of its spans."""


class TrainLoader:
    """An iterator of StepBatch, endless without `passes`; reader threads prefetch.

    Rank r owns the r-th of `dp_size` equal ranges of the sampler's streams. An error in a reader thread is raised
    by `next` at its step, and closes the loader.
    """

    def __init__(
        self,
        sampler: Sampler,
        quarantine: Quarantine,
        *,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        state: LoaderState | None = None,
        passes: int | None = None,
        make_example: MakeExample | None = None,
        workers: int = 1,
    ) -> None:
        """quarantine: must contain that of `state`; this loader adds to it.

        passes: number of epochs, after which all rows are padding; needs a sampler of one pool. make_example:
        by default, rows of text for a causal language model. workers: threads; with 0, `next` reads. Raises
        ValueError if the batch can't be divided.
        """
        n_rows, remainder = divmod(sampler.n_streams, dp_size)
        if remainder or n_rows % micro_batch_size:
            divisors = f"{dp_size} ranks and micro-batches of {micro_batch_size}"
            raise ValueError(f"batch_size={sampler.n_streams} can't be divided into {divisors}")
        state = state or LoaderState()
        self._sampler, self._quarantine = sampler, quarantine
        self._origin, self._cuts = state.origin, state.cuts
        self._micro_batch_size = micro_batch_size
        make_example = make_example or next_token_examples(sampler.seq_len, sampler.corpus.tokenizer.eos_id)
        self.initial_state = state.to_json(sampler)
        """The state before the first batch, as JSON values. On resume, it covers the streams of all ranks."""
        self._stream_ids = range(dp_rank * n_rows, (dp_rank + 1) * n_rows)
        self._step = state.step
        self._damaged: set[SampleId] = set(state.quarantine)
        streams = {stream: state.open_stream(sampler, stream, passes) for stream in self._stream_ids}
        n_readers = min(n_rows, max(1, workers))
        self._readers = [
            _StreamReader(
                sampler,
                {stream: streams[stream] for stream in self._stream_ids[first::n_readers]},
                quarantine,
                step=state.step,
                make_example=make_example,
            )
            for first in range(n_readers)
        ]
        self._threads = [_ReaderThread(reader) for reader in self._readers] if workers > 0 else []
        self._closed = False

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._closed:
            raise RuntimeError("the loader is closed")
        try:
            rows: dict[int, _StreamRow] = {}
            for reader in self._threads or self._readers:
                rows.update(reader.next_rows())
        except BaseException:
            # the streams stopped in the middle of a step, so later batches would be out of order
            self.close()
            raise
        self._step += 1
        return self._batch([rows[stream] for stream in self._stream_ids])

    def prefetch(self) -> None:
        """Starts the threads, so that the first rows are read in the meantime."""
        for thread in self._threads:
            thread.start()

    @property
    def n_damaged(self) -> int:
        """Samples in quarantine so far."""
        return len(self._damaged)

    def add_damaged(self, damaged: Iterable[DamagedSample]) -> None:
        """Quarantines samples that other ranks found damaged. Raises DataError if there are too many."""
        damaged = list(damaged)
        self._damaged |= {sample.id for sample in damaged}
        self._quarantine.add(damaged)

    def close(self) -> None:
        """Stops the reader threads. The loader can't be used afterwards."""
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

    def __exit__(self, *_: object) -> None:
        self.close()

    def _batch(self, rows: list[_StreamRow]) -> StepBatch:
        # rows are identified by stream, since their index within a rank depends on the number of ranks
        examples = [
            {**row.example, "rows": np.asarray(stream)} for stream, row in zip(self._stream_ids, rows, strict=True)
        ]
        size = self._micro_batch_size
        if self._sampler.by_sample:
            # groups rows of similar length; the sum over a step does not depend on the grouping
            examples.sort(key=lambda example: sum(map(np.size, example.values())))
        new = {sample for row in rows for sample in row.skipped_samples} - self._damaged
        self._damaged |= new
        damaged = [self._quarantine.reason(sample) for sample in sorted(new)]
        digests = hashlib.blake2b(b"".join(row.digest for row in rows), digest_size=4).digest()
        streams = {stream: (row.positions, row.digest) for stream, row in zip(self._stream_ids, rows, strict=True)}
        step = self._step

        def make_state() -> dict[str, Any]:
            state = LoaderState(step, self._origin, streams, frozenset(self._damaged), self._cuts)
            return state.to_json(self._sampler)

        return StepBatch(
            batches=[collate(examples[i : i + size]) for i in range(0, len(examples), size)],
            damaged=[sample for sample in damaged if sample is not None],
            checksum=int.from_bytes(digests, "little"),
            make_state=make_state,
            samples={stream: row.samples for stream, row in zip(self._stream_ids, rows, strict=True)},
        )


class _StreamReader:
    """Reads a subset of a rank's streams, step by step."""

    def __init__(
        self,
        sampler: Sampler,
        streams: dict[int, TokenStream],
        quarantine: Quarantine,
        *,
        step: int,
        make_example: MakeExample,
    ) -> None:
        self._sampler, self._streams, self._step, self._make_example = sampler, streams, step, make_example
        self._samples = CheckedReader(quarantine)

    def next_rows(self) -> dict[int, _StreamRow]:
        """The next row of each stream."""
        pools = self._sampler.pools_of_step(self._step)
        self._step += 1
        rows = {}
        for number, stream in self._streams.items():
            self._samples.skipped_samples = []
            pool = int(pools[number])
            draw_key = DrawKey(number, pool, stream.positions[pool])
            spans = stream.next_spans(pool, self._samples.open)
            example, ids = self._make_example(spans, draw_key), [span.id for span in spans]
            skipped_samples = self._samples.skipped_samples
            rows[number] = _StreamRow(example, list(stream.positions), stream.digest, skipped_samples, ids)
        return rows

    def close(self) -> None:
        self._samples.close()


class _ReaderThread:
    """Prefetches up to PREFETCH_STEPS steps of one reader, from `start` or the first call of `next_rows` on."""

    def __init__(self, reader: _StreamReader) -> None:
        self._reader = reader
        self._ready: queue.Queue[dict[int, _StreamRow] | BaseException] = queue.Queue(PREFETCH_STEPS)
        self._is_stopped = threading.Event()
        # daemon: a thread that hangs in a dead file system must not keep the process alive
        self._thread = threading.Thread(target=self._run, name="train-loader", daemon=True)

    def start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def next_rows(self) -> dict[int, _StreamRow]:
        self.start()
        while not self._is_stopped.is_set():  # a stopped thread adds nothing to the queue
            with suppress(queue.Empty):
                rows = self._ready.get(timeout=POLL_SECONDS)
                if isinstance(rows, BaseException):
                    raise rows
                return rows
        raise RuntimeError("the loader is closed")

    def stop(self) -> None:
        self._is_stopped.set()
        with suppress(queue.Empty):
            while True:  # wakes a thread that waits for room in the queue
                self._ready.get_nowait()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join(JOIN_SECONDS)

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
                self._ready.put(rows, timeout=POLL_SECONDS)
                return
