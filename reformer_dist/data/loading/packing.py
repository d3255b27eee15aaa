"""Virtual streams: one for each row of an optimizer step, the same for any number of ranks.

A stream packs the samples of its share of each pass back to back into rows. Where its next row begins is one
integer for each lane, and nothing else is kept from row to row but what saves reading a sample twice. Where a row
of the order holds one sample, it is the next one that is not damaged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.format.sample_reader import Source
from reformer_dist.data.loading.sampler import Lane, Order, ShuffledShard
from reformer_dist.errors import DataError

IGNORED_LABEL = -100
HASH_BYTES = 16


class Tokens(Protocol):
    """What a sample holds: an array of ids, or a range of as many numbers where only places matter."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: slice) -> Any: ...


Open = Callable[[int, Source], Tokens | None]
"""Given the number of its data set, the tokens of a sample; None where it is damaged and to be passed over."""


@dataclass(frozen=True)
class Piece:
    """A run of one sample's tokens that a row predicts."""

    data_set: int
    source: Source
    start: int
    """Which of the sample's tokens is the first; 0 where the row reads it from its beginning."""
    stop: int
    tokens: Tokens
    """Of the whole sample."""

    @property
    def id(self) -> str:
        """Names the tokens among all data sets of the run; what the running hash is taken of."""
        return f"{self.data_set}/{self.source.shard.name}/{self.source.entry.key}:{self.start}-{self.stop}"


class TokenStream:
    """The rows of one virtual stream."""

    def __init__(
        self,
        order: Order,
        stream: int,
        *,
        positions: Sequence[int] | None = None,
        digest: bytes = bytes(HASH_BYTES),
        passes: int | None = None,
    ) -> None:
        """`positions`: tokens, or samples, of each lane that lie before the next row, over all passes.

        `passes`: after how many passes over its one lane the stream ends; None: never.
        """
        self.positions = list(positions or [0] * len(order.lanes))
        self.digest = digest
        """Running hash of the ids of all pieces so far."""
        self._row_units = order.row_units
        self._cursors = [_Cursor(lane, stream, passes) for lane in order.lanes]

    def next_pieces(self, lane: int, open_sample: Open) -> list[Piece]:
        """The pieces of the next row, seq_len tokens together or one sample; fewer where the stream ends.

        Raises DataError where an index can't be read, or whatever comes is damaged.
        """
        pieces, left, place = [], self._row_units, self.positions[lane]
        cursor = self._cursors[lane]
        found = place
        while left > 0 and not cursor.is_at_end(place):
            piece, length = cursor.piece_at(place, left, open_sample)
            place += length
            if piece is None:
                cursor.require_more(place - found)
            else:
                found = place
                pieces.append(piece)
                left -= length
        self.positions[lane] = place
        ids = "\n".join(piece.id for piece in pieces)
        self.digest = hashlib.blake2b(self.digest + ids.encode(), digest_size=HASH_BYTES).digest()
        return pieces


class _Cursor:
    """Finds what lies at a place of one stream in one lane; remembers the shard and the sample found last."""

    def __init__(self, lane: Lane, stream: int, passes: int | None) -> None:
        self._lane, self._passes, self._stream = lane, passes, stream
        self._first, self._length = lane.share(stream)
        self._shard: ShuffledShard | None = None
        self._shard_pass = -1
        self._opened: tuple[Source, Tokens | None] | None = None

    def is_at_end(self, place: int) -> bool:
        return self._passes is not None and place >= self._passes * self._length

    def require_more(self, n_damaged: int) -> None:
        """Raises DataError where so many damaged units in a row are all that will ever come."""
        if not self._lane.shuffle and n_damaged >= self._length:
            right = (
                "copy the shards again, or set data.shuffle=true, by which rows read another share in each pass"
            )
            raise DataError(f"data.shuffle=false: all that row {self._stream} of a step reads is damaged; {right}")

    def piece_at(self, place: int, most: int, open_sample: Open) -> tuple[Piece | None, int]:
        """(what of a sample lies from a place on, units up to the next place); no piece if it is damaged."""
        number, within = divmod(place, self._length)
        unit = self._first + within
        shard = self._shard_at(number, unit)
        at = int(np.searchsorted(shard.starts, unit - shard.start, side="right")) - 1
        start = unit - shard.start - int(shard.starts[at])
        source = Source(shard.part.dataset, shard.part.shard, shard.index.entries[int(shard.samples[at])])
        tokens = self._tokens(shard.part.number, source, open_sample)
        if self._lane.by_sample:
            whole = None if tokens is None else Piece(shard.part.number, source, 0, source.entry.n_tokens, tokens)
            return whole, 1
        length = min(source.entry.n_tokens - start, self._length - within)
        if tokens is None:
            return None, length
        length = min(length, most)
        return Piece(shard.part.number, source, start, start + length, tokens), length

    def _shard_at(self, number: int, unit: int) -> ShuffledShard:
        shard = self._shard
        if shard is None or number != self._shard_pass or not shard.start <= unit < shard.end:
            self._shard = shard = self._lane.shard_at(number, unit)
            self._shard_pass = number
        return shard

    def _tokens(self, data_set: int, source: Source, open_sample: Open) -> Tokens | None:
        if self._opened is None or self._opened[0] != source:
            self._opened = (source, open_sample(data_set, source))
        return self._opened[1]


@dataclass(frozen=True)
class TextRow:
    """seq_len inputs and labels."""

    tokens: NDArray[np.int64]
    """[seq_len + 1]: the labels, and before them what the first label is predicted from."""
    labels: NDArray[np.int64]
    """[seq_len], -100 where there is nothing to predict."""


def make_row(pieces: list[Piece], seq_len: int, eos_id: int, mask_document_starts: bool) -> TextRow:
    """Joins pieces to a row, whose end is padding if the stream has ended.

    The first label is predicted from the token before it in its sample, or the end of text where it is the
    first. `mask_document_starts`: nothing asks for the first token of a sample, which what is before it in the
    row does not tell.
    """
    tokens = np.full(seq_len + 1, eos_id, dtype=np.int64)
    labels = np.full(seq_len, IGNORED_LABEL, dtype=np.int64)
    filled = 0
    for piece in pieces:
        end = filled + piece.stop - piece.start
        tokens[filled + 1 : end + 1] = piece.tokens[piece.start : piece.stop]
        labels[filled:end] = tokens[filled + 1 : end + 1]
        if mask_document_starts and piece.start == 0:
            labels[filled] = IGNORED_LABEL
        filled = end
    if pieces and pieces[0].start > 0:
        tokens[:1] = pieces[0].tokens[pieces[0].start - 1 : pieces[0].start]
    return TextRow(tokens, labels)
