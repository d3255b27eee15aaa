"""Training batches: the rows of each optimizer step that one data-parallel rank handles, read ahead.

Row v of a step comes from virtual stream v, whatever the number of ranks; a rank owns a run of streams.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch

from reformer_dist.data.dataset import Dataset
from reformer_dist.data.order import ShardOrder
from reformer_dist.data.streams import Position, TokenStream
from reformer_dist.errors import DataError

STATE_VERSION = 1
PREFETCH_STEPS = 2


@dataclass(frozen=True)
class StepBatch:
    """A rank's rows of one optimizer step."""

    tokens: torch.Tensor
    """int64 [n_micro, micro_batch_size, seq_len + 1]: the inputs and, one token later, the labels."""
    state: dict[str, Any]
    """The loader's state after this batch, as JSON values: a loader given it goes on with the next batch."""

    @property
    def inputs(self) -> torch.Tensor:
        """int64 [n_micro, micro_batch_size, seq_len]."""
        return self.tokens[..., :-1]

    @property
    def labels(self) -> torch.Tensor:
        """int64 [n_micro, micro_batch_size, seq_len]: the token after each input."""
        return self.tokens[..., 1:]


class TrainLoader:
    """An endless iterator of StepBatch; a thread reads ahead.

    Rank r owns the r-th of `dp_size` equal runs of the `batch_size` streams. A state may hold more streams
    than the rank owns (see `merge_states`), so any number of ranks can go on from it. An error of the reading
    thread is raised by `next`, and the loader is closed then.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seq_len: int,
        batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        shuffle_buffer: int,
        seed: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`batch_size` counts the rows of a step over all ranks.

        Raises DataError where the training split holds no text or the state doesn't fit, and ValueError where
        the batch doesn't divide.
        """
        n_rows, rest = divmod(batch_size, dp_size)
        if rest or n_rows % micro_batch_size:
            shares = f"{dp_size} ranks and micro-batches of {micro_batch_size}"
            raise ValueError(f"batch_size={batch_size} can't be divided into {shares}")
        if dataset.n_bytes("train") == 0:
            raise DataError(f"{dataset.folder}: the training split holds no text; it must hold some")
        self._shape = (n_rows // micro_batch_size, micro_batch_size, seq_len + 1)
        self._identity: dict[str, Any] = {
            "version": STATE_VERSION,
            "dataset": dataset.fingerprint,
            "seed": seed,
            "batch_size": batch_size,
            "seq_len": seq_len,
            "shuffle_buffer": shuffle_buffer,
        }
        owned = range(dp_rank * n_rows, (dp_rank + 1) * n_rows)
        positions = self._read_state(state, owned) if state is not None else {}
        order = ShardOrder(seed, len(dataset.shards("train")))
        self._streams = {
            stream: TokenStream(
                dataset,
                order,
                stream=stream,
                n_streams=batch_size,
                seq_len=seq_len,
                shuffle_buffer=shuffle_buffer,
                position=positions.get(stream),
            )
            for stream in owned
        }
        self._pending: deque[Future[StepBatch]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="train-loader")
        self._closed = False

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._closed:
            raise RuntimeError("the loader is closed")
        try:
            while len(self._pending) <= PREFETCH_STEPS:
                self._pending.append(self._thread.submit(self._read_step))
            return self._pending.popleft().result()
        except BaseException:
            # the streams stopped in the middle of a step: nothing that follows would be in order
            self.close()
            raise

    def close(self) -> None:
        """Stop the reading thread; the loader can't be used after it."""
        self._closed = True
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._streams.clear()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_step(self) -> StepBatch:
        rows = np.stack([stream.next_row() for stream in self._streams.values()])
        positions = {str(index): list(astuple(stream.position)) for index, stream in self._streams.items()}
        tokens = torch.from_numpy(rows).view(self._shape)
        return StepBatch(tokens, {**self._identity, "streams": positions})

    def _read_state(self, state: Mapping[str, Any], owned: range) -> dict[int, Position]:
        for key, right in self._identity.items():
            if state.get(key) != right:
                fix = "go on with the data and settings that the run began with, or begin a new run"
                raise DataError(f"data state: {key} was {state.get(key)!r} and is {right!r} now; {fix}")
        streams = state.get("streams")
        if not isinstance(streams, Mapping):
            raise DataError(f"data state: streams is {streams!r}; it must hold the position of each stream")
        return {stream: _position(streams, stream) for stream in owned}


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state that holds the streams of all ranks' states of the same step.

    Raises DataError where there is none or they are not of one run.
    """
    if not states:
        raise DataError("data state: there is none; at least one rank's must be given")
    shared = {key: value for key, value in states[0].items() if key != "streams"}
    streams: dict[str, Any] = {}
    for state in states:
        if {key: value for key, value in state.items() if key != "streams"} != shared:
            raise DataError(
                "data state: the ranks' states are not of one run; they must differ in their streams only"
            )
        streams.update(state["streams"])
    return {**shared, "streams": {key: streams[key] for key in sorted(streams, key=int)}}


def _position(streams: Mapping[str, Any], stream: int) -> Position:
    numbers = streams.get(str(stream))
    fits = isinstance(numbers, list) and len(numbers) == 3
    if not fits or not all(type(number) is int and number >= 0 for number in numbers or ()):
        raise DataError(f"data state: stream {stream} is {numbers!r}; it must be three non-negative integers")
    return Position(*numbers or ())
