"""Batches of encoded samples on disk, and all samples of all batches in the order in which they are written.

A batch is a file of samples sorted by their keys, beside the keys and the offsets of the samples. The samples of
all batches are read range by range of the keys, each range small enough to be sorted in memory, so memory does not
grow with the data. A batch with a record (.json) is complete, since the record is written last.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.format.tokenizer import Tokenizer
from reformer_dist.data.prepare.encoding import EncodedSample, encode_sample, samples_digest
from reformer_dist.data.prepare.samples import Assigned

RANGE_BYTES = 128 << 20  # of encoded samples that are sorted in memory
_KEY_DTYPE = np.dtype(">u8")  # the beginning of a key, whose order is that of the bytes


@dataclass(frozen=True)
class EncodedBatch:
    """A written batch."""

    path: Path
    size: int
    """Bytes of its samples."""
    digest: str
    """Hash of the raw samples that it was made of."""
    labels: tuple[str, ...] = ()
    """Values of the metadata `label`."""

    @classmethod
    def open(cls, path: Path) -> EncodedBatch | None:
        """The batch of a file that `write_batch` finished; None if there is none."""
        record = path.with_suffix(".json")
        if not record.is_file() or not path.is_file():
            return None
        values = json.loads(record.read_text())
        return cls(path, values["size"], values["digest"], tuple(values["labels"]))

    def bounds(self, edges: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Offsets of the first sample whose key is not below each edge, [edges]."""
        keys = np.fromfile(self.path.with_suffix(".keys"), _KEY_DTYPE).astype(np.uint64)
        offsets = np.fromfile(self.path.with_suffix(".offsets"), np.int64)
        found: NDArray[np.int64] = np.append(offsets, self.size)[np.searchsorted(keys, edges)]
        return found

    def read(self, start: int, stop: int) -> Iterator[EncodedSample]:
        """The samples between two offsets."""
        with self.path.open("rb") as file:
            file.seek(start)
            content = io.BytesIO(file.read(stop - start))
        while content.tell() < stop - start:
            yield EncodedSample.load(content)


def write_batch(path: Path, samples: Sequence[Assigned], tokenizer: Tokenizer, spec: str) -> EncodedBatch:
    """Encodes samples and writes them as a batch, its record last. Raises DataError, as `encode_sample`.

    spec: the specification of the tokenizer, as JSON.
    """
    encoded = sorted((encode_sample(sample, tokenizer) for sample in samples), key=lambda sample: sample.key)
    offsets = []
    with path.open("wb") as file:
        for sample in encoded:
            offsets.append(file.tell())
            sample.dump(file)
        size = file.tell()
    np.frombuffer(b"".join(sample.key[:8] for sample in encoded), _KEY_DTYPE).tofile(path.with_suffix(".keys"))
    np.array(offsets, np.int64).tofile(path.with_suffix(".offsets"))
    labels = sorted({str(s.metadata["label"]) for s in encoded if s.split == "train" and "label" in s.metadata})
    batch = EncodedBatch(path, size, samples_digest(samples, spec), tuple(labels))
    record, partial = path.with_suffix(".json"), path.with_suffix(".partial")
    values = {key: value for key, value in asdict(batch).items() if key != "path"}
    partial.write_text(json.dumps(values))
    partial.replace(record)
    return batch


def in_hash_order(batches: Sequence[EncodedBatch]) -> Iterator[EncodedSample]:
    """The samples of all batches in the order of their keys, for any order in which they came."""
    n_ranges = 1 + sum(batch.size for batch in batches) // RANGE_BYTES
    edges = np.array([(number << 64) // n_ranges for number in range(1, n_ranges)], dtype=np.uint64)
    bounds = [np.concatenate([[0], batch.bounds(edges), [batch.size]]) for batch in batches]
    for number in range(n_ranges):
        pairs = zip(batches, bounds, strict=True)
        found = chain.from_iterable(
            batch.read(int(ends[number]), int(ends[number + 1]))
            for batch, ends in pairs
            if ends[number] < ends[number + 1]
        )
        yield from sorted(found, key=lambda sample: sample.key)
