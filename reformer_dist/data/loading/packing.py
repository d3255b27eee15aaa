"""Virtual streams, and rows packed from the samples that a stream reads.

There is one stream per row of an optimizer step, for any number of ranks. A stream reads its range of each pass
over a pool, sample after sample, without gaps between rows. Its state is one integer per pool: the units (tokens,
or samples) before its next row. If a row holds one sample, it is the next undamaged one.
"""

from __future__ import annotations

import hashlib
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
        self._units_per_row = sampler.units_per_row
        cuts = cuts or [Cut()] * len(sampler.pools)
        parts = [
            StreamPart(cut, pool.n_units, stream, sampler.n_streams)
            for cut, pool in zip(cuts, sampler.pools, strict=True)
        ]
        self._indexes = [StreamIndex(*each, stream, passes) for each in zip(sampler.pools, parts, strict=True)]

    def next_spans(self, pool: int, load_tokens: LoadTokens) -> list[Span]:
        """Spans of the next row: seq_len tokens in total or one sample, fewer at the end of the stream.

        Raises DataError if an index can't be read, or if only damaged samples are left.
        """
        spans, n_remaining, position = [], self._units_per_row, self.positions[pool]
        index = self._indexes[pool]
        last_good_position = position
        while n_remaining > 0 and not index.is_at_end(position):
            span, length = index.span_at(position, n_remaining, load_tokens)
            position += length
            if span is None:
                index.raise_if_all_damaged(position - last_good_position)
            else:
                last_good_position = position
                spans.append(span)
                n_remaining -= length
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
    spans: list[Span], seq_len: int, eos_id: int, mask_document_starts: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(tokens [seq_len + 1], labels [seq_len]) of a row of text, padded if the stream has ended.

    tokens[1:] are the tokens of the spans. tokens[0] is the token before them in the first sample, or end-of-text
    at the beginning of a sample. Labels are tokens[1:], and IGNORE_INDEX for padding and, with
    `mask_document_starts`, for the first token of each sample, which the preceding document does not predict.
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
    if spans and spans[0].start > 0:
        tokens[:1] = spans[0].tokens[spans[0].start - 1 : spans[0].start]
    return tokens, labels
