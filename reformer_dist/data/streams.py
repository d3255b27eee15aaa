"""Virtual streams: one per row of an optimizer step, the same for any number of ranks.

Stream v of V reads elements v, v+V, v+2V, ... of the endless sequence of shards, shuffles the documents of
each, and packs them back to back into rows. A position in a stream is three integers, so a stream resumes by
opening one shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.dataset import Dataset
from reformer_dist.data.documents import read_shuffled_documents
from reformer_dist.data.order import ShardOrder
from reformer_dist.errors import DataError


@dataclass(frozen=True)
class Position:
    """Where the next row of a stream begins."""

    ordinal: int = 0
    """Which of the stream's shards, counted over all epochs."""
    document: int = 0
    """Which document of that shard, in shuffled order."""
    offset: int = 0
    """Which token of that document."""


class TokenStream:
    """Rows of one virtual stream, without end.

    Neighbouring rows share one token, the last of one being the first of the next, so that every token but
    the stream's very first is predicted exactly once.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: ShardOrder,
        *,
        stream: int,
        n_streams: int,
        seq_len: int,
        shuffle_buffer: int,
        position: Position | None = None,
    ) -> None:
        self._dataset = dataset
        self._order = order
        self._stream = stream
        self._n_streams = n_streams
        self._seq_len = seq_len
        self._shuffle_buffer = shuffle_buffer
        self._position = position or Position()
        self._documents: Iterator[NDArray[np.int32]] = iter(())
        self._tokens: NDArray[np.int32] | None = None

    @property
    def position(self) -> Position:
        """Where the next row begins."""
        return self._position

    def next_row(self) -> NDArray[np.int64]:
        """The next seq_len + 1 tokens, [seq_len + 1].

        Raises DataError where a shard can't be read or the position isn't in the data.
        """
        tokens = self._open() if self._tokens is None else self._tokens
        row = np.empty(self._seq_len + 1, dtype=np.int64)
        filled, place = 0, self._position
        while True:
            piece = tokens[place.offset : place.offset + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled == len(row):
                break
            tokens, place = self._next_document(place)
        # the row's last token is the next row's first; it lies in the document at hand
        self._tokens = tokens
        self._position = Position(place.ordinal, place.document, place.offset + len(piece) - 1)
        return row

    def _open(self) -> NDArray[np.int32]:
        place = self._position
        self._documents = self._open_shard(place.ordinal, skip=place.document)
        tokens = next(self._documents, None)
        if tokens is None or place.offset >= len(tokens):
            at = f"shard {place.ordinal}, document {place.document}, token {place.offset}"
            raise DataError(
                f"{self._dataset.folder}: stream {self._stream} has no {at}; the state is of other data"
            )
        return tokens

    def _next_document(self, place: Position) -> tuple[NDArray[np.int32], Position]:
        tokens = next(self._documents, None)
        if tokens is not None:
            return tokens, Position(place.ordinal, place.document + 1)
        self._documents = self._open_shard(place.ordinal + 1)
        return next(self._documents), Position(place.ordinal + 1)  # no shard is empty: Dataset.open refuses it

    def _open_shard(self, ordinal: int, skip: int = 0) -> Iterator[NDArray[np.int32]]:
        index = self._stream + ordinal * self._n_streams
        shard = self._dataset.shards("train")[self._order.shard_at(index)]
        return read_shuffled_documents(
            self._dataset,
            shard,
            shuffle_buffer=self._shuffle_buffer,
            seed=self._order.seed,
            index=index,
            skip=skip,
        )
