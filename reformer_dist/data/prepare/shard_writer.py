"""Writer of datasets: tar shards, their indexes, and dataset.json.

The same documents, in any order, produce the same shards, bit for bit, with any number of processes. Everything is
written to a staging folder and moved into place at the end, dataset.json last, so that a dataset that opens is
complete and a failure leaves an older one unchanged.
"""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reformer_dist.data.format.dataset_layout import (
    DATASET_FILE,
    FORMAT_VERSION,
    MEMBER_SUFFIX,
    SPLITS,
    TEXT_FIELDS,
    TOKENIZER_FILE,
    Shard,
    write_json,
)
from reformer_dist.data.format.tokenizer import Tokenizer
from reformer_dist.data.prepare.encode_parallel import OnRead, encode_batches
from reformer_dist.data.prepare.encoded_batches import in_hash_order
from reformer_dist.data.prepare.encoding import EncodedSample
from reformer_dist.data.prepare.samples import RawSample, assign_splits
from reformer_dist.data.prepare.staging import (
    BATCH_FOLDER,
    dataset_record,
    publish,
    refuse_tar_files_of_others,
    require_no_dataset,
    staging_folder,
)
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
    labels: Sequence[str] | None = (),
    label_spans: bool = False,
    alphabet: str | None = None,
    workers: int = 0,
    resume: bool = False,
    on_read: OnRead = lambda n_bytes: None,
) -> WriteSummary:
    """Writes samples, each with one text per name in `fields`, as a dataset, in an order that shuffles them.

    shard_bytes: maximum size of a tar file, exceeded only by single longer documents. heldout: samples to hold
    out; by default a `heldout_fraction` of the samples, selected by content. labels: those that the metadata may
    hold; None for those of the training samples. label_spans: whether samples say which tokens are labels.
    alphabet: `DNA` if all texts are.
    workers: processes that tokenize, 0 for none besides this one. resume: continue the work of a process that was
    interrupted, and keep it if this one is. on_read: called with the bytes of text of each batch.

    Raises DataError if there is no text, a split is empty, a label is unknown, the folder can't be written, or it
    already holds a dataset and `overwrite` is False.
    """
    folder = Path(folder)
    if shard_bytes < 1:
        raise DataError(f"shard_bytes={shard_bytes}: must be at least 1")
    if not 0 <= heldout_fraction < 1:
        raise DataError(f"heldout_fraction={heldout_fraction}: must be at least 0 and below 1")
    require_no_dataset(folder, overwrite, (DATASET_FILE, TOKENIZER_FILE, *_shard_files(folder)))
    refuse_tar_files_of_others(folder)
    with staging_folder(folder, resume) as staging:
        assigned = assign_splits(samples, heldout, heldout_fraction)
        batches = encode_batches(assigned, tokenizer, staging / BATCH_FOLDER, workers=workers, on_read=on_read)
        if labels is None:
            labels = sorted({label for batch in batches for label in batch.labels})
        summary = _write_splits(in_hash_order(batches), staging, tokenizer.dtype, shard_bytes, labels)
        shutil.rmtree(staging / BATCH_FOLDER)
        _check_splits(summary, heldout_fraction)
        names = {
            **({"fields": list(fields)} if tuple(fields) != TEXT_FIELDS else {}),
            **({"labels": list(labels)} if labels else {}),
            **({"label_spans": True} if label_spans else {}),
            **({"alphabet": alphabet} if alphabet else {}),
        }
        publish(staging, folder, dataset_record(summary.splits, tokenizer, staging, names), _shard_files(folder))
    return summary


def _shard_files(folder: Path) -> list[str]:
    """Names of the shards and indexes that this writer may have written."""
    return [path.name for path in folder.iterdir() if _SHARD_FILE.fullmatch(path.name)] if folder.is_dir() else []


def _write_splits(
    samples: Iterable[EncodedSample], staging: Path, dtype: str, shard_bytes: int, labels: Sequence[str]
) -> WriteSummary:
    writers = {split: _SplitWriter(staging, split, dtype, shard_bytes) for split in SPLITS}
    summary = WriteSummary(splits={split: writer.shards for split, writer in writers.items()})
    try:
        for sample in samples:
            if not sample.payload:
                summary.empty += 1
                continue
            if labels and sample.metadata["label"] not in labels:
                expected = f"it must be one of the training samples': {', '.join(labels)}"
                raise DataError(f"{sample.name}: its label {sample.metadata['label']!r} is unknown; {expected}")
            summary.normalized += sample.is_normalized
            writers[sample.split].add(sample)
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
    dtype: str
    """Of token ids."""
    shard_bytes: int
    shards: list[Shard] = field(default_factory=list)
    _tar: tarfile.TarFile | None = None
    _index: list[dict[str, Any]] = field(default_factory=list)
    _n_documents: int = 0

    def add(self, sample: EncodedSample) -> None:
        size = len(sample.payload)
        if self._tar is not None and self._tar.offset + 1024 + size > self.shard_bytes:
            self.close()
        if self._tar is None:
            self._tar = tarfile.TarFile(self._path(".tar"), "w", format=tarfile.GNU_FORMAT)
        key = f"{self._n_documents:08d}"
        # a new TarInfo has time, owner and group 0, so that shards do not depend on the machine
        member = tarfile.TarInfo(f"{key}.{MEMBER_SUFFIX[self.dtype]}")
        member.size = size
        self._tar.addfile(member, io.BytesIO(sample.payload))
        self._index.append(
            {
                "key": key,
                "document": sample.name,
                "offset": self._tar.offset - -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE,
                "size": size,
                "n_tokens": sum(sample.lengths) + len(sample.lengths),
                "n_bytes": sample.n_bytes,
                "sha256": sample.sha256,
                **({"lengths": list(sample.lengths)} if len(sample.lengths) > 1 else {}),
                **({"facts": dict(sample.metadata)} if sample.metadata else {}),
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
