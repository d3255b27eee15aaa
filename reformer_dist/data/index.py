"""The index beside each shard: where every sample lies, and whether it is still what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.dataset import Dataset
from reformer_dist.data.layout import SPLITS, Shard, file_sha256, read_json, require_count
from reformer_dist.errors import DataError


@dataclass(frozen=True, kw_only=True)
class IndexEntry:
    """One sample of a shard."""

    key: str
    document: str
    """Name of the file, or file and line, that it came from."""
    offset: int
    """Where its content begins in the tar file, in bytes."""
    size: int
    n_tokens: int
    """Its tokens, the end-of-text token included."""
    n_bytes: int
    """Its bytes of text."""
    sha256: str


def read_index(dataset: Dataset, shard: Shard) -> list[IndexEntry]:
    """The samples of a shard in its order; DataError where the index is missing or broken."""
    path = dataset.folder / shard.index_name
    samples = read_json(path).get("samples")
    if not isinstance(samples, list) or len(samples) != shard.samples:
        raise DataError(f"{path}: must list the {shard.samples} samples of {shard.name}")
    return [_entry(sample, path) for sample in samples]


def read_sample(dataset: Dataset, shard: Shard, entry: IndexEntry) -> NDArray[Any]:
    """Token ids of one sample, [n_tokens - 1] without end-of-text, read at its offset."""
    stored = np.dtype(dataset.tokenizer.dtype).newbyteorder("<")
    payload = _payload(dataset, shard, entry)
    return np.frombuffer(payload, dtype=stored, count=len(payload) // stored.itemsize)


def find_damage(dataset: Dataset) -> Iterator[str]:
    """What is not as it was written: one line for each missing or altered shard, index or sample."""
    for split in SPLITS:
        for shard in dataset.shards(split):
            path = dataset.folder / shard.name
            if not path.is_file():
                yield f"{shard.name}: shard is missing"
                continue
            if file_sha256(path) != shard.sha256:
                yield f"{shard.name}: shard is not what was written (sha256 differs)"
            try:
                entries = read_index(dataset, shard)
            except DataError as error:
                yield str(error)
                continue
            for entry in entries:
                if hashlib.sha256(_payload(dataset, shard, entry)).hexdigest() != entry.sha256:
                    yield f"{shard.name}: sample {entry.key} ({entry.document}) is not what was written"


def _entry(sample: object, path: Path) -> IndexEntry:
    record = sample if isinstance(sample, dict) else {}
    for key in ("key", "document", "sha256"):
        if not isinstance(record.get(key), str):
            raise DataError(f"{path}: {key} of a sample is {record.get(key)!r}; it must be a string")
    return IndexEntry(
        key=record["key"],
        document=record["document"],
        sha256=record["sha256"],
        offset=require_count(record, "offset", path),
        size=require_count(record, "size", path),
        n_tokens=require_count(record, "n_tokens", path),
        n_bytes=require_count(record, "n_bytes", path),
    )


def _payload(dataset: Dataset, shard: Shard, entry: IndexEntry) -> bytes:
    path = dataset.folder / shard.name
    try:
        with path.open("rb") as file:
            file.seek(entry.offset)
            return file.read(entry.size)
    except OSError as error:
        raise DataError(f"{path}: shard can't be read ({error.strerror})") from error
