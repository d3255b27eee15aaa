"""Labels at chosen tokens: the spans of a sample that are to be predicted, kept in its metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.format.tokenizer import Tokenizer
from reformer_dist.errors import DataError

SPANS, GROUPS = "label_spans", "label_groups"


def token_spans(
    spans: Sequence[tuple[int, int]], ids: NDArray[Any], tokenizer: Tokenizer, where: str
) -> list[list[int]]:
    """Token offsets [first, last + 1] of spans that are given in bytes of the text, or in ids.

    A span includes the tokens that are partly in it. Raises DataError unless the spans are in order, apart, and
    within the text, or if the tokenizer does not preserve the bytes of text.
    """
    lengths = tokenizer.token_bytes[ids]
    if not lengths.any():
        lengths = np.ones(len(ids), dtype=np.int64)  # the sample's text is ids
    elif not tokenizer.is_lossless:
        raise DataError(f"{where}: label spans need a tokenizer that preserves text, such as bytes or bpe")
    ends = np.cumsum(lengths)
    previous = 0
    for start, stop in spans:
        if not previous <= start < stop <= int(ends[-1]):
            expected = f"spans must be in order, not empty, and within 0 and {int(ends[-1])}"
            raise DataError(f"{where}: label span [{start}, {stop}]: {expected}")
        previous = stop
    first = np.searchsorted(ends, [start for start, _ in spans], side="right")
    last = np.searchsorted(ends, [stop for _, stop in spans], side="left")
    return [[int(a), int(b) + 1] for a, b in zip(first, last, strict=True)]


def label_mask(metadata: Mapping[str, Any], n_tokens: int, where: str) -> NDArray[np.bool_]:
    """Whether each of a sample's tokens is a label, [n_tokens]; all are if its metadata has no spans.

    n_tokens: with the end-of-text token. Raises DataError if the metadata was altered.
    """
    mask = np.zeros(n_tokens, dtype=bool)
    for start, stop in read_spans(metadata, n_tokens, where) or [(0, n_tokens)]:
        mask[start:stop] = True
    return mask


def are_spans(spans: Any, size: int) -> bool:
    """Whether a value of JSON is a list of spans [start, stop], not empty, within 0 and size."""
    return isinstance(spans, list) and all(
        isinstance(span, list)
        and len(span) == 2
        and all(type(end) is int for end in span)
        and 0 <= span[0] < span[1] <= size
        for span in spans
    )


def read_spans(metadata: Mapping[str, Any], n_tokens: int, where: str) -> list[tuple[int, int]]:
    """The token spans in a sample's metadata; empty if it has none. Raises DataError if they were altered."""
    spans = metadata.get(SPANS, [])
    if not are_spans(spans, n_tokens):
        raise DataError(f"{where}: {SPANS} is {spans!r:.80}; it must be pairs of token offsets up to {n_tokens}")
    return [(start, stop) for start, stop in spans]


def read_groups(metadata: Mapping[str, Any], n_spans: int, where: str) -> list[str]:
    """The group of each span in a sample's metadata; empty if it has none. Raises DataError if altered."""
    groups = metadata.get(GROUPS, [])
    are_names = isinstance(groups, list) and all(isinstance(group, str) for group in groups)
    if not are_names or len(groups) not in (0, n_spans):
        raise DataError(f"{where}: {GROUPS} is {groups!r:.80}; it must be a name for each of {n_spans} spans")
    return groups
