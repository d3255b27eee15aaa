"""A dataset: its tokenizer, splits and shards, checked when it is opened."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reformer_dist.data.format.cache import FileCache
from reformer_dist.data.format.dataset_layout import (
    DATASET_FILE,
    FORMAT_VERSION,
    SPLITS,
    TEXT_FIELDS,
    Shard,
    json_sha256,
    parse_json,
    require_count,
    require_plain_name,
    require_sha256,
)
from reformer_dist.data.format.index import IndexCache, ShardIndex
from reformer_dist.data.format.load_tokenizer import load_tokenizer
from reformer_dist.data.format.storage import Folder, LocalFolder, open_folder
from reformer_dist.data.format.tar_members import TextMember
from reformer_dist.data.format.tokenizer import Tokenizer
from reformer_dist.errors import DataError

CACHE_FOLDER = "~/.cache/reformer_dist"
CACHE_GB = 50.0


class Dataset:
    """The checked content of dataset.json. Shards are not opened."""

    def __init__(
        self,
        folder: Folder,
        tokenizer: Tokenizer,
        splits: Mapping[str, list[Shard]],
        spec: str,
        fields: Sequence[str] = TEXT_FIELDS,
        labels: Sequence[str] = (),
        has_label_spans: bool = False,
        alphabet: str | None = None,
        text_member: TextMember | None = None,
    ) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.splits = dict(splits)
        self.tokenizer_spec = spec
        """Specification of the tokenizer, as one line of JSON."""
        self.fields, self.labels = list(fields), list(labels)
        """Names of the fields of a sample; possible labels, if samples have one."""
        self.has_label_spans = has_label_spans
        """Whether the metadata of samples says which of their tokens are labels."""
        self.alphabet = alphabet
        """DNA if all texts are DNA, one byte per base."""
        self.text_member = text_member
        """The member of each sample with its text, if the shards are tar files of another program."""
        self._indexes = IndexCache()

    @classmethod
    def open(cls, address: str | Path, cache: FileCache | None = None) -> Dataset:
        """Reads the dataset.json of a local or remote folder.

        Raises DataError if there is none, or if it is broken or of an unknown format.
        """
        folder = open_folder(str(address), cache or FileCache(CACHE_FOLDER, int(CACHE_GB * 2**30)))
        where = folder.where(DATASET_FILE)
        if isinstance(folder, LocalFolder) and not (folder.path / DATASET_FILE).is_file():
            raise DataError(f"{folder.path}: holds no dataset (no {DATASET_FILE}); {_missing_hint(folder.path)}")
        record = parse_json(folder.read(DATASET_FILE), where)
        _check_record(record, where)
        tokenizer = _load_tokenizer(record["tokenizer"], folder)
        for key in ("vocab_size", "eos_id", "dtype"):
            if record.get(key) != (expected := getattr(tokenizer, key)):
                problem = f"{key} is {record.get(key)!r}; it must be that of the tokenizer, {expected!r}"
                raise DataError(f"{where}: {problem}")
        splits = {split: _read_shards(record["splits"][split], split, where) for split in SPLITS}
        fields, labels = _read_names(record, "fields", where) or TEXT_FIELDS, _read_names(record, "labels", where)
        spec = json.dumps(record["tokenizer"], sort_keys=True)
        has_spans, alphabet = record.get("label_spans") is True, record.get("alphabet")
        member = TextMember.from_record(record.get("text_member"), where)
        return cls(folder, tokenizer, splits, spec, fields, labels, has_spans, alphabet, member)

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer and the records of all shards, independent of the dataset's address."""
        splits = {split: [shard.to_json() for shard in shards] for split, shards in self.splits.items()}
        names = [] if (self.fields, self.labels) == (list(TEXT_FIELDS), []) else [self.fields, self.labels]
        content = json.dumps([self.tokenizer_spec, splits, *names], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def shards(self, split: str) -> list[Shard]:
        """Shards of "train" or "heldout", in the order they were written."""
        return self.splits[split]

    def index(self, shard: Shard) -> ShardIndex:
        """Index of a shard. Raises DataError if it is missing or not the one that was written."""
        dtype = self.tokenizer.dtype if self.text_member is None else None
        return self._indexes.read(self.folder, shard, dtype, len(self.fields))

    def total(self, count: str, split: str) -> int:
        """Sum of a field of Shard (size, samples, tokens, text_bytes) over the shards of a split."""
        return sum(getattr(shard, count) for shard in self.splits[split])

    def find_size_mismatches(self, split: str) -> Iterator[tuple[Shard, int]]:
        """(shard, actual size) of each local shard whose size differs from the recorded one.

        Remote shards are not checked. Raises DataError if a shard is missing.
        """
        if not isinstance(self.folder, LocalFolder):
            return
        for shard in self.splits[split]:
            path = self.folder.path / shard.name
            if not path.is_file():
                raise DataError(f"{path}: shard is missing; it must hold {shard.size} bytes")
            if (size := path.stat().st_size) != shard.size:
                yield shard, size


def _missing_hint(path: Path) -> str:
    """How to get a dataset, or how to find it if the working directory is not that of the run."""
    hint = f"make one with: reformer-shards INPUT --output {path}"
    if path.is_absolute():
        return hint
    return f"a relative path is read from the working directory, {Path.cwd()}; give data.path=..., or {hint}"


def _check_record(record: Mapping[str, Any], where: str) -> None:
    if (version := record.get("format")) != FORMAT_VERSION:
        expected = f"{FORMAT_VERSION}, which this version reads; write the dataset again with reformer-shards"
        raise DataError(f"{where}: format {version!r} is not {expected}")
    if record.get("sha256") != json_sha256(record):
        raise DataError(f"{where}: was altered after it was written (its sha256 differs); copy or write it again")
    spec, splits = record.get("tokenizer"), record.get("splits")
    if not isinstance(spec, dict) or not isinstance(splits, dict) or set(splits) != set(SPLITS):
        raise DataError(f"{where}: must hold a tokenizer and the splits {', '.join(SPLITS)}")


def _read_names(record: Mapping[str, Any], key: str, where: str) -> list[str]:
    names = record.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: {key} is {names!r}; it must be a list of names")
    return names


def _load_tokenizer(spec: Mapping[str, Any], folder: Folder) -> Tokenizer:
    if isinstance(folder, LocalFolder):
        return load_tokenizer(spec, folder.path)
    with tempfile.TemporaryDirectory() as local_copy:
        if "file" in spec:
            name = require_plain_name(spec["file"], folder.where(DATASET_FILE))
            Path(local_copy, name).write_bytes(folder.read(name))
        return load_tokenizer(spec, Path(local_copy))


def _read_shards(entries: object, split: str, where: str) -> list[Shard]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{where}: split {split} must be a list of shards")
    shards = [_read_shard(entry, where) for entry in entries]
    if len({shard.name for shard in shards}) < len(shards):
        raise DataError(f"{where}: split {split} lists a shard twice; each must be listed once")
    return shards


def _read_shard(entry: Mapping[str, Any], where: str) -> Shard:
    shard = Shard(
        name=require_plain_name(entry.get("name"), where),
        sha256=require_sha256(entry, "sha256", where),
        index_sha256=require_sha256(entry, "index_sha256", where),
        **{key: require_count(entry, key, where) for key in ("size", "samples", "tokens", "text_bytes")},
        index=require_plain_name(entry["index"], where) if "index" in entry else None,
    )
    if shard.samples == 0 or shard.tokens < shard.samples:
        counts = f"{shard.samples} samples and {shard.tokens} tokens"
        raise DataError(f"{where}: shard {shard.name} has {counts}; each sample must have an end-of-text token")
    return shard
