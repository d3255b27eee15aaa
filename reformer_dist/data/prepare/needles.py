"""Needles in a haystack: sentences hidden in text at chosen depths, and questions about them at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from reformer_dist.data.prepare.samples import RawSample
from reformer_dist.errors import DataError

DIGITS = 6
ASKED_BYTES = 2 * len("\nThe number of xxxxxxxx is 000000.\n")  # a needle and its question
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


@dataclass(frozen=True)
class Needles:
    """Text with hidden sentences, followed by one question and answer for each of them."""

    text: bytes
    answers: tuple[tuple[int, int], ...]
    """Bytes [start, stop) of each answer at the end of the text."""
    depths: tuple[float, ...]
    """Place of the sentence of each answer in the haystack: 0 is its beginning, 1 its end."""


def hide_needles(draw: np.random.Generator, haystack: bytes, depths: Sequence[float]) -> Needles:
    """Hides a sentence at each depth, at the next line break, and asks for all of them in random order."""
    names = _names(draw, len(depths))
    numbers = ["".join(map(str, draw.integers(0, 10, DIGITS))) for _ in depths]
    pieces, begin = [], 0
    for i in np.argsort(depths, kind="stable"):
        at = haystack.find(b"\n", max(begin, int(depths[i] * len(haystack)))) + 1 or len(haystack)
        pieces += [haystack[begin:at], f"The number of {names[i]} is {numbers[i]}.\n".encode()]
        begin = at
    text = b"".join([*pieces, haystack[begin:]])
    answers, order = [], draw.permutation(len(depths))
    for i in order:
        text += f"\nThe number of {names[i]} is ".encode()
        answers.append((len(text), len(text) + DIGITS))
        text += f"{numbers[i]}.".encode()
    return Needles(text, tuple(answers), tuple(float(depths[i]) for i in order))


def needle_samples(
    draw: np.random.Generator, text: bytes, n_samples: int, *, n_bytes: int, n_needles: int = 4
) -> Iterator[RawSample]:
    """Samples of at most n_bytes, with needles at depths drawn uniformly, in random places of a text.

    Their answers are grouped by their depth, in quarters. Raises DataError if the text or a sample is too short.
    """
    n_asked = n_needles * ASKED_BYTES
    n_haystack = n_bytes - n_asked
    if n_haystack < n_asked or len(text) <= n_haystack:
        expected = (
            f"must be at least {2 * n_asked} for {n_needles} needles, and shorter than the text of {len(text)}"
        )
        raise DataError(f"n_bytes={n_bytes}: {expected}")
    for number in range(n_samples):
        start = int(draw.integers(0, len(text) - n_haystack))
        needles = hide_needles(draw, text[start : start + n_haystack], draw.random(n_needles).tolist())
        quarters = [int(depth * 4) * 25 for depth in needles.depths]
        groups = [f"{n_bytes:,} bytes, depth {quarter:>2} to {quarter + 25} %" for quarter in quarters]
        yield RawSample(
            f"needle:{number}", (needles.text,), label_spans=needles.answers, label_groups=tuple(groups)
        )


def _names(draw: np.random.Generator, n: int) -> list[str]:
    """Different names of four syllables."""
    names: dict[str, None] = {}
    while len(names) < n:
        names["".join(draw.choice(SYLLABLES, 4))] = None
    return list(names)
