"""Division of a pool's passes among streams, which may change in the middle of a pass.

Each of V streams reads 1/V of every pass, a contiguous range of its sequence of units (tokens or samples). A run
that changes its number of rows, or their length, *recuts*: what its streams have not read of the passes that they
have begun is concatenated, stream by stream, and that of each pass is divided equally among the new streams. So no
unit is read twice or left out. Later passes are whole again. If all streams are equally far, as without damaged
samples, and their number stays, each continues where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Interval = tuple[int, int]
"""[first, end) units of a pass."""


@dataclass(frozen=True)
class Cut:
    """A division of a pool, the same for any number of streams."""

    position: int = 0
    """Of every stream where the cut begins: beyond all positions before, so that none occurs twice."""
    first_pass: int = 0
    rest: tuple[tuple[Interval, ...], ...] = ()
    """What is left of `first_pass` and the passes after it that have begun. The others are whole."""


class StreamPart:
    """What one stream reads of a pool. Positions count its units over all passes."""

    def __init__(self, cut: Cut, n_units: int, stream: int, n_streams: int) -> None:
        self._cut = cut
        self._rest = [_part(intervals, stream, n_streams) for intervals in cut.rest]
        [self._whole] = _part([(0, n_units)], stream, n_streams)

    @property
    def pass_length(self) -> int:
        """Units of a whole pass."""
        return _length([self._whole])

    def locate(self, position: int) -> tuple[int, int, int]:
        """(pass, unit of the pass, units from it on without a gap) at a position."""
        offset = position - self._cut.position
        for number, intervals in enumerate(self._rest):
            for first, end in intervals:
                if offset < end - first:
                    return self._cut.first_pass + number, first + offset, end - first - offset
                offset -= end - first
        first, end = self._whole
        passes, offset = divmod(offset, self.pass_length)
        return self._cut.first_pass + len(self._rest) + passes, first + offset, end - first - offset

    def position_after(self, passes: int) -> int:
        """Position at which all passes before number `passes` have been read; that of the cut if it is later."""
        n_passes = max(0, passes - self._cut.first_pass)
        partial = sum(map(_length, self._rest[:n_passes]))
        return self._cut.position + partial + max(0, n_passes - len(self._rest)) * self.pass_length

    def left_of(self, pass_index: int, position: int) -> list[Interval]:
        """What the stream, at a position, has not read of a pass."""
        number = pass_index - self._cut.first_pass
        intervals = self._rest[number] if number < len(self._rest) else [self._whole]
        n_read = max(0, position - self.position_after(pass_index))
        return _slice(intervals, n_read, _length(intervals))


def recut(cut: Cut, positions: Sequence[int], n_units: int) -> Cut:
    """Divides anew what the streams at these positions have not read of a pool with `n_units` per pass."""
    parts = [StreamPart(cut, n_units, stream, len(positions)) for stream in range(len(positions))]
    current = [part.locate(position)[0] for part, position in zip(parts, positions, strict=True)]
    rest = []
    # passes may have begun in a cut before, in which they are not whole either
    for pass_index in range(min(current), max(max(current) + 1, cut.first_pass + len(cut.rest))):
        streams = zip(parts, positions, strict=True)
        left = [interval for part, position in streams for interval in part.left_of(pass_index, position)]
        rest.append(_joined(left))
    while rest and rest[-1] == ((0, n_units),):
        rest.pop()
    return Cut(max(positions), min(current), tuple(rest))


@dataclass(frozen=True)
class Era:
    """Steps of a run with the same rows."""

    end_step: int | None
    """Steps done when it ends; None for the last."""
    n_streams: int
    units_per_row: int


def end_of_passes(passes: int, origin: tuple[int, int], cut: Cut, n_units: int, eras: Sequence[Era]) -> int:
    """The step that completes a number of passes over a single pool, if no sample is damaged.

    origin: (step, pass) at which the cut began. eras: from that step on.
    """
    step, first_pass = origin
    for era, following in pairwise([*eras, None]):
        assert era is not None
        parts = [StreamPart(cut, n_units, stream, era.n_streams) for stream in range(era.n_streams)]
        spans = [(part.position_after(first_pass), part.position_after(passes)) for part in parts]
        last = step + -(-max(end - first for first, end in spans) // era.units_per_row)
        if following is None or era.end_step is None or last <= era.end_step:
            return last
        n_read = (era.end_step - step) * era.units_per_row
        cut = recut(cut, [min(first + n_read, end) for first, end in spans], n_units)
        step, first_pass = era.end_step, cut.first_pass
    raise AssertionError("eras must not be empty")


def end_of_packed_passes(
    passes: int,
    origin: tuple[int, int],
    cut: Cut,
    n_streams: int,
    row_len: int,
    n_units: int,
    sample_lengths: Callable[[int], NDArray[np.int64]],
) -> int:
    """As `end_of_passes`, for rows of as many samples as fit into row_len tokens.

    sample_lengths: of a pass, the tokens of its samples in order, [n_units].
    """
    step, first_pass = origin
    lengths = {number: np.minimum(sample_lengths(number), row_len) for number in range(first_pass, passes)}
    counts = [0]
    for stream in range(n_streams):
        part = StreamPart(cut, n_units, stream, n_streams)
        position, end = part.position_after(first_pass), part.position_after(passes)
        samples = [np.zeros(0, dtype=np.int64)]
        while position < end:
            pass_index, unit, n_contiguous = part.locate(position)
            samples.append(lengths[pass_index][unit : unit + n_contiguous])
            position += n_contiguous
        counts.append(count_packed_rows(np.concatenate(samples), row_len))
    return step + max(counts)


def count_packed_rows(lengths: NDArray[np.int64], row_len: int) -> int:
    """Rows of row_len tokens that samples of these lengths take; one that does not fit begins the next row."""
    ends = np.cumsum(lengths)
    first = n_rows = 0
    while first < len(ends):
        begin = ends[first] - lengths[first]
        first = int(np.searchsorted(ends, begin + row_len, side="right"))
        n_rows += 1
    return n_rows


def _part(intervals: Sequence[Interval], stream: int, n_streams: int) -> list[Interval]:
    """The `stream`-th of equal parts of concatenated intervals."""
    n_units = _length(intervals)
    return _slice(intervals, n_units * stream // n_streams, n_units * (stream + 1) // n_streams)


def _slice(intervals: Sequence[Interval], low: int, high: int) -> list[Interval]:
    """Units [low, high) of concatenated intervals."""
    parts, start = [], 0
    for first, end in intervals:
        part = first + max(0, low - start), min(end, first + high - start)
        if part[0] < part[1]:
            parts.append(part)
        start += end - first
    return parts


def _joined(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """Intervals, of which each that begins where the one before ends is joined to it."""
    joined: list[Interval] = []
    for first, end in intervals:
        if joined and joined[-1][1] == first:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((first, end))
    return tuple(joined)


def _length(intervals: Sequence[Interval]) -> int:
    return sum(end - first for first, end in intervals)
