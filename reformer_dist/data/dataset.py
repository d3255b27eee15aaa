"""A data set on disk, opened and checked: its tokenizer, its splits and its shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reformer_dist.data.layout import (
    DATASET_FILE,
    FORMAT,
    SPLITS,
    Shard,
    read_json,
    require_count,
    require_plain_name,
)
from reformer_dist.data.tokenizer import Tokenizer, load_tokenizer
from reformer_dist.errors import DataError


class Dataset:
    """What dataset.json says, checked; the shards themselves are not opened."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, splits: Mapping[str, list[Shard]], fingerprint: str
    ) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.splits = dict(splits)
        self.fingerprint = fingerprint
        """sha256 over the tokenizer and the names and checksums of all shards."""

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """Read the dataset.json of a folder.

        Raises DataError where there is none, or it is broken, or it is of a format that isn't known.
        """
        folder = Path(folder)
        path = folder / DATASET_FILE
        if not path.is_file():
            how = f"make one with: python tools/make_shards.py INPUT --output {folder}"
            raise DataError(f"{folder}: holds no data set (no {DATASET_FILE}); {how}")
        record = read_json(path)
        if record.get("format") != FORMAT:
            raise DataError(f"{path}: format {record.get('format')!r} is unknown; it must be {FORMAT}")
        spec = record.get("tokenizer")
        listed = record.get("splits")
        if not isinstance(spec, dict) or not isinstance(listed, dict) or set(listed) != set(SPLITS):
            raise DataError(f"{path}: must hold a tokenizer and the splits {', '.join(SPLITS)}")
        tokenizer = load_tokenizer(spec, folder)
        _check_tokenizer(record, tokenizer, path)
        splits = {split: _read_shards(listed[split], split, path) for split in SPLITS}
        return cls(folder, tokenizer, splits, _fingerprint(spec, splits))

    def shards(self, split: str) -> list[Shard]:
        """Shards of "train" or "heldout", in the order in which they were written."""
        return self.splits[split]

    def n_samples(self, split: str) -> int:
        """Documents of a split."""
        return sum(shard.samples for shard in self.splits[split])

    def n_tokens(self, split: str) -> int:
        """Tokens of a split, the end-of-text token of each document included."""
        return sum(shard.tokens for shard in self.splits[split])

    def n_bytes(self, split: str) -> int:
        """Bytes of text of a split."""
        return sum(shard.text_bytes for shard in self.splits[split])

    def check(self, split: str) -> None:
        """Raise DataError, naming the shard, unless every shard of a split has its recorded size."""
        for shard in self.splits[split]:
            path = self.folder / shard.name
            if not path.is_file():
                raise DataError(f"{path}: shard is missing; it must hold {shard.size} bytes")
            found = path.stat().st_size
            if found != shard.size:
                raise DataError(
                    f"{path}: shard holds {found} bytes, expected {shard.size}; copy or write it again"
                )


def _check_tokenizer(record: Mapping[str, Any], tokenizer: Tokenizer, path: Path) -> None:
    for key in ("vocab_size", "eos_id", "dtype"):
        found, right = record.get(key), getattr(tokenizer, key)
        if found != right:
            raise DataError(f"{path}: {key} is {found!r}; it must be the tokenizer's, {right!r}")


def _read_shards(listed: object, split: str, path: Path) -> list[Shard]:
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise DataError(f"{path}: split {split} must be a list of shards")
    shards = [_read_shard(entry, path) for entry in listed]
    names = [shard.name for shard in shards]
    if len(set(names)) < len(names):
        raise DataError(f"{path}: split {split} lists a shard twice; each must be listed once")
    return shards


def _read_shard(entry: Mapping[str, Any], path: Path) -> Shard:
    sha256 = entry.get("sha256")
    if not isinstance(sha256, str):
        raise DataError(f"{path}: sha256 is {sha256!r}; it must be a string")
    shard = Shard(
        name=require_plain_name(entry.get("name"), path),
        size=require_count(entry, "size", path),
        sha256=sha256,
        samples=require_count(entry, "samples", path),
        tokens=require_count(entry, "tokens", path),
        text_bytes=require_count(entry, "text_bytes", path),
    )
    if shard.samples == 0 or shard.tokens < shard.samples:
        counts = f"{shard.samples} samples and {shard.tokens} tokens"
        raise DataError(f"{path}: shard {shard.name} has {counts}; each sample must end with a token of its own")
    return shard


def _fingerprint(spec: Mapping[str, Any], splits: Mapping[str, list[Shard]]) -> str:
    listed = {split: [[shard.name, shard.sha256] for shard in shards] for split, shards in splits.items()}
    content = json.dumps({"tokenizer": dict(spec), "splits": listed}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
