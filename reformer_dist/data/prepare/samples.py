"""Samples before they are written: the split of each, and the order in which they are written.

Both depend on content, not on the order of the inputs. Whether a sample is held out is decided by a hash of its
text, so that copies are in the same split. Samples are written in the order of another hash: each shard is then a
random sample of the whole, although the inputs came one source after another.
"""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from reformer_dist.data.format.dataset_layout import SPLITS

SORTED_BYTES = 256 << 20
SAMPLE_OVERHEAD = 512  # bytes of the objects that hold a sample, about
MAX_TAIL_SHIFT = 64 << 10
_KEY_BYTES = 16


@dataclass(frozen=True)
class RawSample:
    """A sample before tokenization. Its values must be plain, since `in_hash_order` marshals them to disk."""

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
    if others or sample.metadata or sample.label_spans or len(text) < 2:
        return None
    target = min(max(1, int(len(text) * (1 - heldout_fraction))), len(text) - 1)
    earliest = max(0, target - min((len(text) - target) // 2, MAX_TAIL_SHIFT))
    found = (text.rfind(mark, earliest, target) + len(mark) for mark in (b"\n\n", b"\r\n\r\n", b"\n", b" "))
    cut = next((end for end in found if earliest < end <= target), target)
    while text[cut] & 0xC0 == 0x80 and cut > max(1, target - 4):  # within a character of UTF-8
        cut -= 1
    end = replace(sample, name=f"{sample.name} (end)", fields=(text[cut:],))
    return replace(sample, fields=(text[:cut],)), end


def _split_rank(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"heldout").digest(), "big")


def in_hash_order(samples: Iterable[Assigned], scratch: Path, depth: int = 0) -> Iterator[Assigned]:
    """The samples in the order of a hash of their names and fields, for any order in which they come.

    Up to SORTED_BYTES are sorted in memory. If there are more, all are first written to files in `scratch`,
    by byte `depth` of the hash, and each file is sorted in the same way.
    """
    iterator = iter(samples)
    waiting: list[tuple[bytes, Assigned]] = []
    n_bytes = 0
    for split, sample in iterator:
        waiting.append((_order_key(sample), (split, sample)))
        n_bytes += SAMPLE_OVERHEAD + sum(map(len, sample.fields))
        if n_bytes > SORTED_BYTES and depth < _KEY_BYTES:
            break
    else:
        waiting.sort(key=lambda pair: pair[0])
        yield from (assigned for _, assigned in waiting)
        return
    with ExitStack() as stack:
        files: dict[int, BinaryIO] = {}
        for key, assigned in chain(waiting, ((_order_key(pair[1]), pair) for pair in iterator)):
            if key[depth] not in files:
                path = scratch / f"{depth}-{key[depth]}"
                files[key[depth]] = stack.enter_context(path.open("wb"))
            marshal.dump(_to_values(assigned), files[key[depth]])
    del waiting
    for number in sorted(files):
        path = scratch / f"{depth}-{number}"
        yield from in_hash_order(_read_scratch(path), scratch, depth + 1)
        path.unlink()


def _order_key(sample: RawSample) -> bytes:
    digest = hashlib.blake2b(
        sample.name.encode("utf-8", "surrogateescape"), digest_size=_KEY_BYTES, person=b"order"
    )
    for text in sample.fields:
        digest.update(b"\0" + text)
    return digest.digest()


def _to_values(assigned: Assigned) -> list[Any]:
    split, sample = assigned
    values = [getattr(sample, each.name) for each in fields(sample)]
    return [split, *(dict(value) if isinstance(value, Mapping) else value for value in values)]


def _read_scratch(path: Path) -> Iterator[Assigned]:
    with path.open("rb") as file:
        while file.peek(1):
            split, *values = marshal.load(file)  # written by this process
            yield split, RawSample(*values)
