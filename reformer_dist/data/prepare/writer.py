"""Writes a data set: documents to tar shards, indexes and dataset.json.

The same documents give the same shards, bit for bit. Everything is written aside and moved into place at the
end, dataset.json last, so that what opens is whole, and a failure leaves an older data set as it was.
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
from typing import Any

import numpy as np

from reformer_dist.data.format.layout import (
    DATASET_FILE,
    FORMAT_VERSION,
    MEMBER_SUFFIX,
    MAX_SAMPLE_BYTES,
    SPLITS,
    TEXT_FIELDS,
    TOKENIZER_FILE,
    Shard,
    file_sha256,
    json_sha256,
    write_json,
)
from reformer_dist.data.format.tokenizer import Tokenizer
from reformer_dist.data.prepare.records import RawSample
from reformer_dist.errors import DataError

_OURS = re.compile(r"(train|heldout)-\d{6,}\.(tar|json)")


@dataclass
class WriteSummary:
    """What `write_dataset` wrote."""

    splits: dict[str, list[Shard]]
    empty: int = 0
    """Documents left out since they, or one of their fields, held no text."""
    replaced: int = 0
    """Documents that the tokenizer changed: it replaced bytes that are not UTF-8, or normalised the text."""

    def total(self, count: str, *splits: str) -> int:
        """Sum of a field of Shard (size, samples, tokens, text_bytes) over splits; none named means all."""
        return sum(getattr(shard, count) for split in splits or SPLITS for shard in self.splits[split])


def is_heldout(text: bytes, heldout_fraction: float) -> bool:
    """Whether a document is held out: decided by its content alone, so that copies are never split."""
    digest = hashlib.blake2b(text, digest_size=8, person=b"heldout").digest()
    return int.from_bytes(digest, "big") < heldout_fraction * 2.0**64


def write_dataset(
    documents: Iterable[tuple[str, bytes]],
    folder: str | Path,
    tokenizer: Tokenizer,
    shard_bytes: int = 16 << 20,
    heldout_fraction: float = 0.05,
    overwrite: bool = False,
) -> WriteSummary:
    """Write (name, text) documents as a data set; see `write_samples`."""
    records = (RawSample(name, (text,)) for name, text in documents)
    return write_samples(records, folder, tokenizer, shard_bytes, heldout_fraction, overwrite)


def write_samples(
    records: Iterable[RawSample],
    folder: str | Path,
    tokenizer: Tokenizer,
    shard_bytes: int = 16 << 20,
    heldout_fraction: float = 0.05,
    overwrite: bool = False,
    *,
    heldout: Iterable[RawSample] | None = None,
    fields: Sequence[str] = TEXT_FIELDS,
    labels: Sequence[str] = (),
) -> WriteSummary:
    """Write records, each of as many texts as `fields` names, as a data set.

    A shard is closed before it would outgrow `shard_bytes` of tar; a longer document has a shard of its own.
    `heldout_fraction` is the share of records, chosen by content, that are held out, unless those to be held out
    are given. `labels`: all that their facts may hold. Raises DataError where there is no text, a split comes out
    empty, a label is another, or the folder can't be written or already holds a data set and `overwrite` is False.
    """
    folder = Path(folder)
    if shard_bytes < 1:
        raise DataError(f"shard_bytes={shard_bytes}: must be at least 1")
    if not 0 <= heldout_fraction < 1:
        raise DataError(f"heldout_fraction={heldout_fraction}: must be at least 0 and below 1")
    if not overwrite and any(_existing(folder)):
        raise DataError(f"{folder}: already holds a data set; give another folder, or --overwrite to replace it")
    with _staging(folder) as staging:
        splitted = assign_splits(records, heldout, heldout_fraction)
        summary = _write_splits(splitted, staging, tokenizer, shard_bytes, labels)
        _require_splits(summary, heldout_fraction)
        record = _describe(summary, tokenizer, staging, fields, labels)
        _move_into_place(staging, folder, record)
    return summary


def _existing(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name in (DATASET_FILE, TOKENIZER_FILE) or _OURS.fullmatch(path.name):
            yield path


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    staging = folder / ".writing"
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        staging.mkdir(parents=True)
        yield staging
    except OSError as error:
        raise DataError(f"{folder}: can't be written ({error}); it must be a folder with room, or free") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def assign_splits(
    records: Iterable[RawSample], heldout: Iterable[RawSample] | None, heldout_fraction: float
) -> Iterator[tuple[str, RawSample]]:
    """Each record with its split: held out are those that are given for it, or else a share of them all."""
    for record in records:
        held = heldout is None and is_heldout(record.split_key or b"\0".join(record.fields), heldout_fraction)
        yield "heldout" if held else "train", record
    yield from (("heldout", record) for record in heldout or ())


def _write_splits(
    records: Iterable[tuple[str, RawSample]],
    staging: Path,
    tokenizer: Tokenizer,
    shard_bytes: int,
    labels: Sequence[str],
) -> WriteSummary:
    writers = {split: _SplitWriter(staging, split, tokenizer, shard_bytes) for split in SPLITS}
    summary = WriteSummary(splits={split: writer.shards for split, writer in writers.items()})
    try:
        for split, record in records:
            if not all(record.fields):
                summary.empty += 1
                continue
            if labels and record.facts["label"] not in labels:
                right = f"it must be one of the training samples': {', '.join(labels)}"
                raise DataError(f"{record.name}: its label {record.facts['label']!r} is unknown; {right}")
            normalize = tuple(tokenizer.normalize(text) for text in record.fields)
            summary.replaced += normalize != record.fields
            writers[split].add(replace(record, fields=normalize))
    finally:
        for writer in writers.values():
            writer.close()
    return summary


def _require_splits(summary: WriteSummary, heldout_fraction: float) -> None:
    n_documents = summary.total("samples")
    if n_documents == 0 and summary.empty == 0:
        raise DataError("no text: no document was given; the inputs must hold some text")
    if n_documents == 0:
        raise DataError(f"no text: {summary.empty} documents, all empty; the inputs must hold some text")
    if heldout_fraction > 0 and not summary.splits["heldout"]:
        more = "give more documents or a larger fraction (0 for none)"
        raise DataError(
            f"no document of {n_documents} was held out at heldout fraction {heldout_fraction}; {more}"
        )
    if not summary.splits["train"]:
        more = "give more documents or a smaller fraction"
        raise DataError(
            f"all {n_documents} documents were held out at heldout fraction {heldout_fraction}; {more}"
        )


def _describe(
    summary: WriteSummary, tokenizer: Tokenizer, staging: Path, fields: Sequence[str], labels: Sequence[str]
) -> dict[str, Any]:
    record = {
        "format": FORMAT_VERSION,
        "tokenizer": tokenizer.save(staging),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "dtype": tokenizer.dtype,
        **({"fields": list(fields)} if tuple(fields) != TEXT_FIELDS else {}),
        **({"labels": list(labels)} if labels else {}),
        "splits": {split: [asdict(shard) for shard in shards] for split, shards in summary.splits.items()},
    }
    return {**record, "sha256": json_sha256(record)}


def _move_into_place(staging: Path, folder: Path, record: dict[str, Any]) -> None:
    # without its dataset.json the old data set no longer opens, so that no mixture of old and new ever does
    (folder / DATASET_FILE).unlink(missing_ok=True)
    for path in list(_existing(folder)):
        path.unlink()
    for path in sorted(staging.iterdir()):
        path.replace(folder / path.name)
    write_json(folder / DATASET_FILE, record)


@dataclass
class _SplitWriter:
    """The shards of one split; `shards` lists those that are closed."""

    folder: Path
    split: str
    tokenizer: Tokenizer
    shard_bytes: int
    shards: list[Shard] = field(default_factory=list)
    _tar: tarfile.TarFile | None = None
    _index: list[dict[str, Any]] = field(default_factory=list)
    _n_documents: int = 0

    def add(self, record: RawSample) -> None:
        parts = [self.tokenizer.encode(text) for text in record.fields]
        ids = np.concatenate(parts)
        payload = ids.astype(np.dtype(self.tokenizer.dtype).newbyteorder("<")).tobytes()
        if len(payload) > MAX_SAMPLE_BYTES:
            right = f"a document may hold {MAX_SAMPLE_BYTES} at most: cut it into several"
            raise DataError(f"{record.name}: holds {len(payload)} bytes of token ids; {right}")
        if self._tar is not None and self._tar.offset + 1024 + len(payload) > self.shard_bytes:
            self.close()
        if self._tar is None:
            self._tar = tarfile.TarFile(self._path(".tar"), "w", format=tarfile.GNU_FORMAT)
        key = f"{self._n_documents:08d}"
        # a TarInfo of its own has time, owner and group 0: nothing of this machine gets into the shard
        member = tarfile.TarInfo(f"{key}.{MEMBER_SUFFIX[self.tokenizer.dtype]}")
        member.size = len(payload)
        self._tar.addfile(member, io.BytesIO(payload))
        self._index.append(
            {
                "key": key,
                "document": record.name,
                "offset": self._tar.offset - -(-len(payload) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE,
                "size": len(payload),
                "n_tokens": len(ids) + len(parts),
                "n_bytes": sum(map(len, record.fields)),
                "sha256": hashlib.sha256(payload).hexdigest(),
                **({"lengths": [len(part) for part in parts]} if len(parts) > 1 else {}),
                **({"facts": dict(record.facts)} if record.facts else {}),
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
