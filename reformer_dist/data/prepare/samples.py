"""Samples before they are tokenized, and the split of each.

Split and order depend on content, not on the order of the inputs. Whether a sample is held out is decided by a
hash of its text, so that copies are in the same split. Samples are written in the order of another hash
(`encoding.order_key`): each shard is a random sample of the whole, although inputs came one source after another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Any

import numpy as np

from reformer_dist.data.format.dataset_layout import SPLITS
from reformer_dist.data.prepare.fill_in_middle import FillInMiddle

ID_DTYPE = np.dtype("<u4")
"""Of ids in the fields of a RawSample."""
SAMPLE_OVERHEAD = 512  # bytes of the objects that hold a sample, about
MAX_TAIL_SHIFT = 64 << 10


@dataclass(frozen=True)
class RawSample:
    """A sample before tokenization."""

    name: str
    """File and line, or another description of its origin."""
    fields: tuple[bytes, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Data that is not text, as JSON values."""
    label_spans: tuple[tuple[int, int], ...] = ()
    """Spans [start, stop) of the first field that are to be predicted, in bytes, or in ids if the text is ids; the
    whole sample if empty."""
    label_groups: tuple[str, ...] = ()
    """A name per span, by which the accuracy of evaluations is broken down; may be empty."""
    split_key: bytes | None = None
    """Samples with the same key are in the same split; None for the fields themselves."""
    is_divisible: bool = False
    """Whether its end is held out and the rest is not, as of a text file that is given by itself."""
    is_ids: bool = False
    """Whether its fields are token ids in ID_DTYPE instead of text."""
    part_sizes: tuple[int, ...] = ()
    """Bytes of the parts of its text that stay whole, such as files; one part if empty."""
    fill_in_middle: FillInMiddle | None = None
    """How its parts are reordered if it is a training sample."""


Assigned = tuple[str, RawSample]
"""(split, sample)."""


def is_heldout(text: bytes, heldout_fraction: float) -> bool:
    """Whether a document is held out. A function of its content, so that copies are in the same split."""
    return _split_rank(text) < heldout_fraction * 2.0**64


def assign_splits(
    samples: Iterable[RawSample], heldout: Iterable[RawSample] | None, heldout_fraction: float
) -> Iterator[Assigned]:
    """(split, sample) of each sample. If `heldout` is None, a fraction of the samples is held out, by content.

    With a fraction above 0, no split stays empty: of two different samples at least one is held out and one is
    not, and a single text is divided into its beginning and its end.
    """
    if heldout is not None or heldout_fraction == 0:
        yield from (("train", sample) for sample in samples)
        yield from (("heldout", sample) for sample in heldout or ())
    else:
        yield from _assign_by_content(samples, heldout_fraction)


def _assign_by_content(samples: Iterable[RawSample], fraction: float) -> Iterator[Assigned]:
    waiting: list[RawSample] = []  # copies of one sample, the nearest to the split that is still empty
    waiting_rank = 0
    filled: set[str] = set()

    def split_of(rank: int) -> str:
        return "heldout" if rank < fraction * 2.0**64 else "train"

    for sample in samples:
        parts = divide(sample, fraction) if sample.is_divisible else None
        if parts is not None:
            filled = set(SPLITS)
            yield from zip(SPLITS, parts, strict=True)
            continue
        rank = _split_rank(sample.split_key or b"\0".join(sample.fields))
        if len(filled) == len(SPLITS) or not all(sample.fields):  # those with empty fields are not written
            yield split_of(rank), sample
        elif not waiting or rank == waiting_rank:
            waiting, waiting_rank = [*waiting, sample], rank
        elif (split := split_of(rank)) != split_of(waiting_rank):
            filled = set(SPLITS)
            yield split, sample
        else:  # the lower the rank, the nearer to being held out
            filled.add(split)
            if (rank < waiting_rank) == (split == "train"):
                yield from ((split, each) for each in waiting)
                waiting, waiting_rank = [sample], rank
            else:
                yield split, sample
    if waiting:
        yield from _assign_last(waiting, split_of(waiting_rank), filled, fraction)


def _assign_last(copies: list[RawSample], split: str, filled: set[str], fraction: float) -> Iterator[Assigned]:
    """Assigns copies of a sample of this split to the one that would stay empty, if any."""
    for sample in copies:
        parts = None if filled else divide(sample, fraction)
        if parts is not None:
            yield from zip(SPLITS, parts, strict=True)
        else:
            yield next((empty for empty in SPLITS if filled == {split} and empty != split), split), sample


def divide(sample: RawSample, heldout_fraction: float) -> tuple[RawSample, RawSample] | None:
    """(training part, held-out end) of a text, cut near the right place, at a blank line, line or word.

    None if it is not a plain text, or shorter than two bytes.
    """
    [text, *others] = sample.fields
    if others or sample.metadata or sample.label_spans or sample.part_sizes or len(text) < 2:
        return None
    target = min(max(1, int(len(text) * (1 - heldout_fraction))), len(text) - 1)
    if sample.is_ids:
        return _divide_at(sample, target // ID_DTYPE.itemsize * ID_DTYPE.itemsize)
    earliest = max(0, target - min((len(text) - target) // 2, MAX_TAIL_SHIFT))
    found = (text.rfind(mark, earliest, target) + len(mark) for mark in (b"\n\n", b"\r\n\r\n", b"\n", b" "))
    cut = next((end for end in found if earliest < end <= target), target)
    while text[cut] & 0xC0 == 0x80 and cut > max(1, target - 4):  # within a character of UTF-8
        cut -= 1
    return _divide_at(sample, cut)


def _divide_at(sample: RawSample, cut: int) -> tuple[RawSample, RawSample] | None:
    [text] = sample.fields
    if not 0 < cut < len(text):
        return None
    end = replace(sample, name=f"{sample.name} (end)", fields=(text[cut:],))
    return replace(sample, fields=(text[:cut],)), end


def _split_rank(text: bytes) -> int:
    return _hash(text, b"heldout")


def _hash(text: bytes, purpose: bytes) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=purpose).digest(), "big")


def sample_texts(texts: Iterable[bytes], max_bytes: int) -> list[bytes]:
    """Texts of at most `max_bytes` in total, in their order: all, or a sample that depends on content alone."""
    kept: list[tuple[int, int, bytes]] = []  # those with the lowest hashes, the highest first
    total = 0
    for number, text in enumerate(texts):
        text = text[:max_bytes]
        heappush(kept, (-_hash(text, b"sample"), number, text))
        total += len(text)
        while total > max_bytes:
            total -= len(heappop(kept)[2])
    return [text for _, _, text in sorted(kept, key=lambda each: each[1])]
