"""The index next to each shard: offset and checksum of every sample."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.format.cache import FileRef
from reformer_dist.data.format.dataset_layout import (
    FORMAT_VERSION,
    MAX_SAMPLE_BYTES,
    Shard,
    parse_json,
    require_count,
    require_plain_name,
    require_sha256,
)
from reformer_dist.data.format.storage import Folder
from reformer_dist.errors import DataError

HEADER_BYTES = 512  # of a tar member, directly before its content
MAX_CACHED_INDEXES = 16  # as many as all streams together read at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexEntry:
    """One sample of a shard."""

    key: str
    document: str
    """Source file, or file and line."""
    offset: int
    """Byte offset of its content in the tar file."""
    size: int
    n_tokens: int
    """Including the end-of-text token of each field."""
    n_bytes: int
    """Bytes of text."""
    sha256: str
    lengths: tuple[int, ...] = ()
    """Stored tokens of each field, if there are several."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Data that is not text, such as a label; "facts" in the file."""


@dataclass(frozen=True)
class ShardIndex:
    """Samples of a shard in the order of the tar file."""

    entries: list[IndexEntry]
    n_tokens: NDArray[np.int64]
    """[samples]"""


def read_index(folder: Folder, shard: Shard, dtype: str | None, n_fields: int = 1) -> ShardIndex:
    """The index of a shard, checked against dataset.json and for consistency. Raises DataError if it is wrong.

    dtype: of the stored token ids; None if texts are stored. n_fields: of each sample.
    """
    where = folder.where(shard.index_name)
    with os.fdopen(folder.open(FileRef(shard.index_name, None, shard.index_sha256)), "rb") as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != shard.index_sha256:
        raise DataError(f"{where}: is not the index that was written (sha256 differs); copy it again")
    record = parse_json(content, where)
    samples = record.get("samples")
    header = (record.get("format"), record.get("shard"))
    if header != (FORMAT_VERSION, shard.name) or not isinstance(samples, list):
        raise DataError(f"{where}: must be an index of {shard.name} in format {FORMAT_VERSION}")
    itemsize = None if dtype is None else np.dtype(dtype).itemsize
    entries = [_read_entry(sample, where, itemsize, n_fields) for sample in samples]
    _check_offsets(entries, shard, where)
    totals = (len(entries), sum(entry.n_tokens for entry in entries), sum(entry.n_bytes for entry in entries))
    recorded = (shard.samples, shard.tokens, shard.text_bytes)
    if totals != recorded:
        counts = "{} samples, {} tokens and {} bytes of text"
        raise DataError(f"{where}: lists {counts.format(*totals)}; dataset.json has {counts.format(*recorded)}")
    return ShardIndex(entries, np.array([entry.n_tokens for entry in entries], dtype=np.int64))


class IndexCache:
    """A thread-safe LRU cache of indexes, since several streams may read the same shard."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._cached: OrderedDict[str, ShardIndex] = OrderedDict()

    def read(self, folder: Folder, shard: Shard, dtype: str | None, n_fields: int) -> ShardIndex:
        with self._lock:
            name = folder.where(shard.index_name)
            if name not in self._cached:
                self._cached[name] = read_index(folder, shard, dtype, n_fields)
            self._cached.move_to_end(name)
            if len(self._cached) > MAX_CACHED_INDEXES:
                self._cached.popitem(last=False)
            return self._cached[name]


def _read_entry(sample: object, where: str, itemsize: int | None, n_fields: int) -> IndexEntry:
    record: dict[str, Any] = sample if isinstance(sample, dict) else {}
    if not isinstance(record.get("document"), str):
        raise DataError(f"{where}: document of a sample is {record.get('document')!r}; it must be a string")
    key = require_plain_name(record.get("key"), where)
    entry = IndexEntry(
        key=key,
        document=record["document"],
        sha256=require_sha256(record, "sha256", where),
        lengths=_read_lengths(record, n_fields, f"{where}: sample {key}"),
        metadata=record["facts"] if isinstance(record.get("facts"), dict) else {},
        **{name: require_count(record, name, where) for name in ("offset", "size", "n_tokens", "n_bytes")},
    )
    if entry.size > MAX_SAMPLE_BYTES:
        raise DataError(f"{where}: sample {key} holds {entry.size} bytes; none may hold above {MAX_SAMPLE_BYTES}")
    if itemsize is None:
        if entry.n_tokens < 1:
            raise DataError(f"{where}: sample {key} has no token; it must have an end-of-text token")
        return entry
    n_stored = entry.size // itemsize
    is_consistent = sum(entry.lengths) == n_stored if entry.lengths else n_fields == 1
    if entry.size % itemsize or entry.n_tokens != n_stored + n_fields or not is_consistent:
        expected = f"must hold whole ids of {itemsize} bytes, and count one more token for each field"
        raise DataError(
            f"{where}: sample {key} holds {entry.size} bytes and {entry.n_tokens} tokens; it {expected}"
        )
    return entry


def _read_lengths(record: Mapping[str, Any], n_fields: int, where: str) -> tuple[int, ...]:
    lengths = record.get("lengths", [])
    are_counts = isinstance(lengths, list) and all(type(length) is int and length >= 0 for length in lengths)
    if not are_counts or len(lengths) != (n_fields if n_fields > 1 else 0):
        raise DataError(f"{where} has field lengths {lengths!r}; it must have one for each of {n_fields} fields")
    return tuple(lengths)


def _check_offsets(entries: list[IndexEntry], shard: Shard, where: str) -> None:
    """Raises DataError unless samples follow each other within the shard and have unique keys."""
    end = 0
    for entry in entries:
        if entry.offset % HEADER_BYTES or entry.offset < end + HEADER_BYTES:
            expected = f"must be a multiple of {HEADER_BYTES} from {end + HEADER_BYTES} on"
            raise DataError(f"{where}: sample {entry.key} begins at {entry.offset}; it {expected}")
        end = entry.offset + entry.size
    if end > shard.size:
        raise DataError(f"{where}: the last sample ends at {end}, beyond the shard's {shard.size} bytes")
    if len({entry.key for entry in entries}) < len(entries):
        raise DataError(f"{where}: lists a key twice; each sample must have its own")
