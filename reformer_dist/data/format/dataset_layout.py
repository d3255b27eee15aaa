"""The layout of a dataset on disk: file names, and the record of one shard.

docs/data_order.md describes the format for users.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reformer_dist.errors import DataError
from reformer_dist.fs.atomic import write_atomic

FORMAT_VERSION = 2
DATASET_FILE = "dataset.json"
TOKENIZER_FILE = "tokenizer.json"
SPLITS = ("train", "heldout")
TEXT_FIELDS = ("text",)
"""Fields of a sample if dataset.json names none."""
MEMBER_SUFFIX = {"uint8": "txt", "uint16": "u16", "uint32": "u32"}
"""Suffix of a sample's tar member by the dtype of its token ids (little-endian)."""
MAX_SAMPLE_BYTES = 1 << 30
"""Larger samples are refused, since every rank would allocate the size that a forged index claims."""


def id_dtype(vocab_size: int) -> str:
    """dtype that stores the ids of a learned vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Record of one tar file in dataset.json."""

    name: str
    size: int
    """Bytes of the tar file."""
    sha256: str
    index_sha256: str
    """Of the index file next to it."""
    samples: int
    tokens: int
    """Including the end-of-text token of each field of each sample."""
    text_bytes: int
    index: str | None = None
    """Name of the index file, if it isn't that of the tar file with .json."""

    @property
    def index_name(self) -> str:
        """Name of the index file next to the shard."""
        return self.index or str(Path(self.name).with_suffix(".json"))

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def require_plain_name(name: object, where: str) -> str:
    """The name, if it is a plain file name. Raises DataError for paths, `..` and `pipe:`."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0"):
        raise DataError(f"{where}: file name {name!r} is refused; it must name a file in the same folder")
    return name


def require_count(record: Mapping[str, Any], key: str, where: str) -> int:
    """record[key]. Raises DataError if it is not a non-negative integer."""
    value = record.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"{where}: {key} is {value!r}; it must be a non-negative integer")
    return value


def require_sha256(record: Mapping[str, Any], key: str, where: str) -> str:
    """record[key]. Raises DataError if it is not a sha256 in hexadecimal digits."""
    value = record.get(key)
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise DataError(f"{where}: {key} is {value!r}; it must be 64 hexadecimal digits")
    return value


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object in a file's content. Raises DataError if it is not one."""
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not valid JSON ({error}); write the dataset again") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: holds a {type(value).__name__}; it must hold a JSON object")
    return value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically."""
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def json_sha256(record: Mapping[str, Any]) -> str:
    """sha256 of JSON values, independent of spaces and the order of keys, without the key "sha256" itself."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
