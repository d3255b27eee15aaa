"""Virtual streams, and rows packed from the samples that a stream reads.

There is one stream per row of an optimizer step, for any number of ranks. A stream reads its range of each pass
over a pool, sample after sample, without gaps between rows. Its state is one integer per pool: the units (tokens,
or samples) before its next row. If a row holds one sample, it is the next undamaged one. If samples are packed, it
holds the next ones, as long as they fit.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.format.sample_reader import SampleRef
from reformer_dist.data.loading.cut import Cut, StreamPart
from reformer_dist.data.loading.sampler import Pool, Sampler, ShuffledGroup
from reformer_dist.errors import DataError
from reformer_dist.ops.cross_entropy import IGNORE_INDEX

HASH_BYTES = 16

Tokens = NDArray[Any] | range
"""Token ids of a sample, or a range of the same length if only positions are needed."""
LoadTokens = Callable[[int, SampleRef], Tokens | None]
"""(dataset index, sample) -> its tokens, or None if it is damaged and must be skipped."""


@dataclass(frozen=True)
class Span:
    """Target tokens of a row from one sample, tokens[start:stop]."""

    dataset_index: int
    ref: SampleRef
    start: int
    stop: int
    tokens: Tokens
    """All tokens of the sample."""

    @property
    def id(self) -> str:
        """Identifies the tokens among all datasets of the run. The running hash covers these ids."""
        return f"{self.dataset_index}/{self.ref.shard.name}/{self.ref.entry.key}:{self.start}-{self.stop}"


class TokenStream:
    """The rows of one virtual stream."""

    def __init__(
        self,
        sampler: Sampler,
        stream: int,
        *,
        positions: Sequence[int] | None = None,
        digest: bytes = bytes(HASH_BYTES),
        passes: int | None = None,
        cuts: Sequence[Cut] | None = None,
    ) -> None:
        """positions: units before the next row, per pool, over all passes. passes: None for an endless stream.

        cuts: of the pools, if the run has divided them anew.
        """
        self.positions = list(positions or [0] * len(sampler.pools))
        self.digest = digest
        """Running hash of the ids of all spans so far."""
        self._units_per_row, self._packed_len = sampler.units_per_row, sampler.packed_len
        cuts = cuts or [Cut()] * len(sampler.pools)
        parts = [
            StreamPart(cut, pool.n_units, stream, sampler.n_streams)
            for cut, pool in zip(cuts, sampler.pools, strict=True)
        ]
        self._indexes = [StreamIndex(*each, stream, passes) for each in zip(sampler.pools, parts, strict=True)]

    def next_spans(self, pool: int, load_tokens: LoadTokens) -> list[Span]:
        """Spans of the next row: seq_len tokens in total, one sample, or the next samples, as long as they fit.

        There are fewer at the end of the stream. Raises DataError if an index can't be read, or if only damaged
        samples are left.
        """
        spans, n_remaining, position = [], self._packed_len or self._units_per_row, self.positions[pool]
        index = self._indexes[pool]
        last_good_position = position
        while n_remaining > 0 and not index.is_at_end(position):
            span, length = index.span_at(position, n_remaining, load_tokens)
            if span is None:
                position += length
                index.raise_if_all_damaged(position - last_good_position)
                continue
            n_remaining -= length if self._packed_len is None else min(span.stop, self._packed_len)
            if n_remaining < 0:
                break  # the sample begins the next row
            position += length
            last_good_position = position
            spans.append(span)
        self.positions[pool] = position
        ids = "\n".join(span.id for span in spans)
        self.digest = hashlib.blake2b(self.digest + ids.encode(), digest_size=HASH_BYTES).digest()
        return spans

    def skip_rows(self, n_rows: Sequence[int]) -> None:
        """Advances by rows of each pool, as if no sample were damaged, without updating the hash."""
        moves = zip(self._indexes, self.positions, n_rows, strict=True)
        self.positions = [index.skip(position, n * self._units_per_row) for index, position, n in moves]


class StreamIndex:
    """Maps positions of one stream in one pool to samples. Caches the last group and sample."""

    def __init__(self, pool: Pool, part: StreamPart, stream: int, passes: int | None) -> None:
        self._pool, self._part, self._stream = pool, part, stream
        self._end = None if passes is None else part.position_after(passes)
        self._group: ShuffledGroup | None = None
        self._group_pass = -1
        self._sample: tuple[SampleRef, Tokens | None] | None = None

    def is_at_end(self, position: int) -> bool:
        return self._end is not None and position >= self._end

    def skip(self, position: int, n_units: int) -> int:
        """The position `n_units` later, or the end of the stream."""
        return position + n_units if self._end is None else min(position + n_units, self._end)

    def raise_if_all_damaged(self, n_damaged: int) -> None:
        """Raises DataError if `n_damaged` consecutive damaged units are all that this stream ever reads."""
        if not self._pool.shuffle and n_damaged >= self._part.pass_length:
            hint = "so that each epoch assigns different samples to each row"
            raise DataError(
                f"data.shuffle=false: every sample assigned to batch row {self._stream} is damaged; restore the "
                f"damaged shards, or set data.shuffle=true {hint}"
            )

    def span_at(self, position: int, max_length: int, load_tokens: LoadTokens) -> tuple[Span | None, int]:
        """(span that begins at a position, units to advance); the span is None if the sample is damaged."""
        pass_index, unit, n_contiguous = self._part.locate(position)
        group = self._group
        if group is None or pass_index != self._group_pass or not group.start <= unit < group.end:
            self._group = group = self._pool.group_at(pass_index, unit)
            self._group_pass = pass_index
        source, entry, start = group.sample_at(unit)
        dataset_index, ref = source.dataset_index, SampleRef(source.dataset, source.shard, entry)
        if self._sample is None or self._sample[0] != ref:
            self._sample = (ref, load_tokens(dataset_index, ref))
        tokens = self._sample[1]
        if self._pool.by_sample:
            return None if tokens is None else Span(dataset_index, ref, 0, ref.entry.n_tokens, tokens), 1
        length = min(ref.entry.n_tokens - start, n_contiguous)
        if tokens is None:
            return None, length
        length = min(length, max_length)
        return Span(dataset_index, ref, start, start + length, tokens), length


def pack_spans(
    spans: list[Span],
    seq_len: int,
    eos_id: int,
    mask_document_starts: bool = False,
    *,
    separate: bool = False,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(tokens [seq_len + 1], labels [seq_len]) of a row of text, padded if the stream has ended.

    tokens[1:] are the tokens of the spans. tokens[0] is the token before them in the first sample, or end-of-text
    at the beginning of a sample. Labels are tokens[1:], and IGNORE_INDEX for padding and, with
    `mask_document_starts`, for the first token of each sample, which the preceding document does not predict.
    separate: the token before the first one of *each* span is that of its sample, as in `document_ids`.
    """
    tokens = np.full(seq_len + 1, eos_id, dtype=np.int64)
    labels = np.full(seq_len, IGNORE_INDEX, dtype=np.int64)
    filled = 0
    for span in spans:
        end = filled + span.stop - span.start
        tokens[filled + 1 : end + 1] = span.tokens[span.start : span.stop]
        labels[filled:end] = tokens[filled + 1 : end + 1]
        if mask_document_starts and span.start == 0:
            labels[filled] = IGNORE_INDEX
        filled = end
    starts = span_starts(spans)
    for span, start in list(zip(spans, starts, strict=True))[: None if separate else 1]:
        tokens[start] = span.tokens[span.start - 1] if span.start > 0 else eos_id
    return tokens, labels


def span_starts(spans: list[Span]) -> list[int]:
    """Tokens of the row before each span."""
    return [0, *itertools.accumulate(span.stop - span.start for span in spans)][: len(spans)]


def document_ids(spans: list[Span], seq_len: int) -> NDArray[np.int32]:
    """The span whose token each token of a row of text is to predict, [seq_len]; padding is one more document.

    The end-of-text token after a document is the input that predicts the first token of the next one, and belongs
    to that.
    """
    lengths = [span.stop - span.start for span in spans]
    lengths.append(seq_len - sum(lengths))
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


def positions_in_documents(document_ids: NDArray[Any]) -> NDArray[np.int64]:
    """Position of each token in its document, or the part of it in the row, from document ids [..., seq_len]."""
    index = np.broadcast_to(np.arange(document_ids.shape[-1]), document_ids.shape)
    is_start = np.diff(document_ids, axis=-1, prepend=-1) != 0
    return index - np.maximum.accumulate(np.where(is_start, index, 0), axis=-1)
