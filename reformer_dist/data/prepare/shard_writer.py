"""Writer of datasets: tar shards, their indexes, and dataset.json.

The same documents, in any order, produce the same shards, bit for bit. Everything is written to a staging folder
and moved into place at the end, dataset.json last, so that a dataset that opens is complete and a failure leaves
an older one unchanged.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from reformer_dist.data.format.dataset_layout import (
    DATASET_FILE,
    FORMAT_VERSION,
    MAX_SAMPLE_BYTES,
    MEMBER_SUFFIX,
    SPLITS,
    TEXT_FIELDS,
    TOKENIZER_FILE,
    Shard,
    json_sha256,
    write_json,
)
from reformer_dist.data.format.label_spans import GROUPS, SPANS, token_spans
from reformer_dist.data.format.tokenizer import Tokenizer
from reformer_dist.data.prepare.samples import RawSample, assign_splits, in_hash_order
from reformer_dist.errors import DataError
from reformer_dist.fs.atomic import file_sha256

_SHARD_FILE = re.compile(r"(train|heldout)-\d{6,}\.(tar|json)")


@dataclass
class WriteSummary:
    """Result of `write_dataset`."""

    splits: dict[str, list[Shard]]
    empty: int = 0
    """Documents skipped because they, or one of their fields, contain no text."""
    normalized: int = 0
    """Documents changed by `Tokenizer.normalize`, which replaces invalid UTF-8 or normalizes the text."""

    def total(self, count: str, *splits: str) -> int:
        """Sum of a field of Shard (size, samples, tokens, text_bytes) over splits, by default all."""
        return sum(getattr(shard, count) for split in splits or SPLITS for shard in self.splits[split])


def write_dataset(
    documents: Iterable[tuple[str, bytes]],
    folder: str | Path,
    tokenizer: Tokenizer,
    shard_bytes: int = 16 << 20,
    heldout_fraction: float = 0.05,
    overwrite: bool = False,
) -> WriteSummary:
    """Writes (name, text) documents as a dataset. See `write_samples`."""
    samples = (RawSample(name, (text,)) for name, text in documents)
    return write_samples(samples, folder, tokenizer, shard_bytes, heldout_fraction, overwrite)


def write_samples(
    samples: Iterable[RawSample],
    folder: str | Path,
    tokenizer: Tokenizer,
    shard_bytes: int = 16 << 20,
    heldout_fraction: float = 0.05,
    overwrite: bool = False,
    *,
    heldout: Iterable[RawSample] | None = None,
    fields: Sequence[str] = TEXT_FIELDS,
    labels: Sequence[str] = (),
    label_spans: bool = False,
) -> WriteSummary:
    """Writes samples, each with one text per name in `fields`, as a dataset, in an order that shuffles them.

    shard_bytes: maximum size of a tar file, exceeded only by single longer documents. heldout: samples to hold
    out; by default a `heldout_fraction` of the samples, selected by content. labels: those that the metadata may
    hold. label_spans: whether samples say which of their tokens are labels.

    Raises DataError if there is no text, a split is empty, a label is unknown, the folder can't be written, or it
    already holds a dataset and `overwrite` is False.
    """
    folder = Path(folder)
    if shard_bytes < 1:
        raise DataError(f"shard_bytes={shard_bytes}: must be at least 1")
    if not 0 <= heldout_fraction < 1:
        raise DataError(f"heldout_fraction={heldout_fraction}: must be at least 0 and below 1")
    if not overwrite and any(_dataset_files(folder)):
        raise DataError(f"{folder}: already holds a dataset; give another folder, or --overwrite to replace it")
    with _staging(folder) as staging:
        assigned = assign_splits(samples, heldout, heldout_fraction)
        with TemporaryDirectory(dir=staging) as scratch:
            ordered = in_hash_order(assigned, Path(scratch))
            summary = _write_splits(ordered, staging, tokenizer, shard_bytes, labels)
        _check_splits(summary, heldout_fraction)
        record = {
            "format": FORMAT_VERSION,
            "tokenizer": tokenizer.save(staging),
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "dtype": tokenizer.dtype,
            **({"fields": list(fields)} if tuple(fields) != TEXT_FIELDS else {}),
            **({"labels": list(labels)} if labels else {}),
            **({"label_spans": True} if label_spans else {}),
            "splits": {split: [asdict(shard) for shard in shards] for split, shards in summary.splits.items()},
        }
        # dataset.json is removed first, so that a mixture of the old and the new dataset never opens
        (folder / DATASET_FILE).unlink(missing_ok=True)
        for path in list(_dataset_files(folder)):
            path.unlink()
        for path in sorted(staging.iterdir()):
            path.replace(folder / path.name)
        write_json(folder / DATASET_FILE, {**record, "sha256": json_sha256(record)})
    return summary


def _dataset_files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name in (DATASET_FILE, TOKENIZER_FILE) or _SHARD_FILE.fullmatch(path.name):
            yield path


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    staging = folder / ".writing"
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a killed process
        staging.mkdir(parents=True)
        yield staging
    except OSError as error:
        raise DataError(
            f"{folder}: can't be written ({error}); it must be a writable folder with free space, or not exist"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_splits(
    samples: Iterable[tuple[str, RawSample]],
    staging: Path,
    tokenizer: Tokenizer,
    shard_bytes: int,
    labels: Sequence[str],
) -> WriteSummary:
    writers = {split: _SplitWriter(staging, split, tokenizer, shard_bytes) for split in SPLITS}
    summary = WriteSummary(splits={split: writer.shards for split, writer in writers.items()})
    try:
        for split, sample in samples:
            if not all(sample.fields):
                summary.empty += 1
                continue
            if labels and sample.metadata["label"] not in labels:
                expected = f"it must be one of the training samples': {', '.join(labels)}"
                raise DataError(f"{sample.name}: its label {sample.metadata['label']!r} is unknown; {expected}")
            normalized = tuple(tokenizer.normalize(text) for text in sample.fields)
            summary.normalized += normalized != sample.fields
            writers[split].add(replace(sample, fields=normalized))
    finally:
        for writer in writers.values():
            writer.close()
    return summary


def _check_splits(summary: WriteSummary, heldout_fraction: float) -> None:
    n_documents = summary.total("samples")
    if n_documents == 0:
        documents = f"{summary.empty} documents, all empty" if summary.empty else "no document was given"
        raise DataError(f"no text: {documents}; the inputs must hold some text")
    held_out = f"held out at heldout fraction {heldout_fraction}"
    if heldout_fraction > 0 and not summary.splits["heldout"]:
        hint = "give more documents or a larger fraction (0 for none)"
        raise DataError(f"no document of {n_documents} was {held_out}; {hint}")
    if not summary.splits["train"]:
        hint = "give more documents or a smaller fraction"
        raise DataError(f"all {n_documents} documents were {held_out}; {hint}")


@dataclass
class _SplitWriter:
    """Writer of the shards of one split; `shards` lists the closed ones."""

    folder: Path
    split: str
    tokenizer: Tokenizer
    shard_bytes: int
    shards: list[Shard] = field(default_factory=list)
    _tar: tarfile.TarFile | None = None
    _index: list[dict[str, Any]] = field(default_factory=list)
    _n_documents: int = 0

    def add(self, sample: RawSample) -> None:
        parts = [self.tokenizer.encode(text) for text in sample.fields]
        ids = np.concatenate(parts)
        metadata = dict(sample.metadata)
        if sample.label_spans:
            metadata[SPANS] = token_spans(sample.label_spans, parts[0], self.tokenizer, sample.name)
            metadata |= {GROUPS: list(sample.label_groups)} if sample.label_groups else {}
        payload = ids.astype(np.dtype(self.tokenizer.dtype).newbyteorder("<")).tobytes()
        if len(payload) > MAX_SAMPLE_BYTES:
            expected = f"the maximum is {MAX_SAMPLE_BYTES}: cut the document into several"
            raise DataError(f"{sample.name}: holds {len(payload)} bytes of token ids; {expected}")
        if self._tar is not None and self._tar.offset + 1024 + len(payload) > self.shard_bytes:
            self.close()
        if self._tar is None:
            self._tar = tarfile.TarFile(self._path(".tar"), "w", format=tarfile.GNU_FORMAT)
        key = f"{self._n_documents:08d}"
        # a new TarInfo has time, owner and group 0, so that shards do not depend on the machine
        member = tarfile.TarInfo(f"{key}.{MEMBER_SUFFIX[self.tokenizer.dtype]}")
        member.size = len(payload)
        self._tar.addfile(member, io.BytesIO(payload))
        self._index.append(
            {
                "key": key,
                "document": sample.name,
                "offset": self._tar.offset - -(-len(payload) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE,
                "size": len(payload),
                "n_tokens": len(ids) + len(parts),
                "n_bytes": sum(map(len, sample.fields)),
                "sha256": hashlib.sha256(payload).hexdigest(),
                **({"lengths": [len(part) for part in parts]} if len(parts) > 1 else {}),
                **({"facts": metadata} if metadata else {}),
            }
        )
        self._n_documents += 1

    def close(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        path, index = self._path(".tar"), self._path(".json")
        write_json(index, {"format": FORMAT_VERSION, "shard": path.name, "samples": self._index})
        shard = Shard(
            name=path.name,
            size=path.stat().st_size,
            sha256=file_sha256(path),
            index_sha256=file_sha256(index),
            samples=len(self._index),
            tokens=sum(entry["n_tokens"] for entry in self._index),
            text_bytes=sum(entry["n_bytes"] for entry in self._index),
        )
        self.shards.append(shard)
        self._tar, self._index = None, []

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.split}-{len(self.shards):06d}{suffix}"
