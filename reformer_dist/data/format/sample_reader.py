"""Reads single samples of a shard at their offsets, and verifies their checksums.

A sample that was truncated or altered by accident is damaged and can be skipped. A member that no writer of this
format produces and that could do harm elsewhere (a link, a device, a pickle, a name outside the folder, a size
beyond the shard) is refused as an attack. In neither case is anything unpacked, executed or unpickled.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.format.cache import FileRef
from reformer_dist.data.format.dataset import Dataset
from reformer_dist.data.format.dataset_layout import MEMBER_SUFFIX, Shard
from reformer_dist.data.format.index import HEADER_BYTES, IndexEntry
from reformer_dist.errors import DataError

PICKLE_SUFFIXES = (".pkl", ".pickle", ".pyd", ".pth", ".pt", ".npy")
MAX_OPEN_FILES = 32


class DamagedSampleError(Exception):
    """A sample differs from what was written; the message is the reason."""


@dataclass(frozen=True)
class SampleRef:
    """A reference to a sample of a dataset."""

    dataset: Dataset
    shard: Shard
    entry: IndexEntry

    @property
    def where(self) -> str:
        """Shard and key, for error messages."""
        return f"{self.dataset.folder.where(self.shard.name)}: sample {self.entry.key}"


class SampleReader:
    """Reads samples; keeps up to MAX_OPEN_FILES files open. Not thread-safe."""

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[Dataset, str], int] = OrderedDict()

    def read(self, ref: SampleRef) -> NDArray[np.unsignedinteger]:
        """Tokens of a sample, [n_tokens], in the narrowest dtype. Each field ends with end-of-text.

        Raises DamagedSampleError if it differs from what was written, and DataError if its shard is missing or the
        sample is refused.
        """
        content = self._read_bytes(ref)
        header, payload = content[:HEADER_BYTES], content[HEADER_BYTES:]
        size = ref.entry.size
        if len(payload) < size:
            raise DamagedSampleError(f"is torn: {len(payload)} of {size} bytes are there")
        _check_header(header, ref)
        if hashlib.sha256(payload).hexdigest() != ref.entry.sha256:
            raise DamagedSampleError("is altered: its sha256 differs from the index")
        return _decode_tokens(payload, ref)

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _read_bytes(self, ref: SampleRef) -> bytes:
        descriptor = self._open(ref.dataset, ref.shard)
        start, end = ref.entry.offset - HEADER_BYTES, ref.entry.offset + ref.entry.size
        content = b""
        try:
            while block := os.pread(descriptor, end - start - len(content), start + len(content)):
                content += block
        except OSError as error:
            raise DataError(f"{ref.where}: can't be read ({error.strerror})") from error
        return content

    def _open(self, dataset: Dataset, shard: Shard) -> int:
        name = (dataset, shard.name)
        if name not in self._files:
            self._files[name] = dataset.folder.open(FileRef(shard.name, shard.size, shard.sha256))
        self._files.move_to_end(name)
        if len(self._files) > MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return self._files[name]


def _check_header(header: bytes, ref: SampleRef) -> None:
    try:
        member = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError as error:
        raise DamagedSampleError(f"is altered: its tar header is broken ({error})") from error
    name, where = member.name, ref.where
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        raise DataError(f"{where} is named {name!r}; names must be relative and without ..")
    if not member.isreg():
        raise DataError(f"{where} is a link, device or folder in the tar; each sample must be a regular file")
    if name.lower().endswith(PICKLE_SUFFIXES):
        raise DataError(f"{where} is named {name!r}; files that may be pickles are refused")
    if member.size > ref.shard.size:
        raise DataError(f"{where} claims {member.size} bytes; the whole shard holds {ref.shard.size}")
    if ref.dataset.text_member is not None:  # named by another program
        if member.size != ref.entry.size:
            raise DamagedSampleError(f"is altered: {name!r} of {member.size} bytes is in its place")
        return
    expected = f"{ref.entry.key}.{MEMBER_SUFFIX[ref.dataset.tokenizer.dtype]}"
    if (name, member.size) != (expected, ref.entry.size):
        raise DamagedSampleError(f"is altered: {name!r} of {member.size} bytes is in its place")


def _decode_tokens(payload: bytes, ref: SampleRef) -> NDArray[np.unsignedinteger]:
    tokenizer, member = ref.dataset.tokenizer, ref.dataset.text_member
    if member is None:
        ids = np.frombuffer(payload, dtype=np.dtype(tokenizer.dtype).newbyteorder("<"))
    else:
        ids = tokenizer.encode(tokenizer.normalize(member.text(payload, ref.where)))
        if len(ids) != ref.entry.n_tokens - 1:
            problem = f"has {len(ids)} tokens, and {ref.entry.n_tokens - 1} when it was indexed"
            raise DataError(f"{ref.where} {problem}; index the tar files again, with these versions of packages")
    if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
        expected = f"ids must be below {tokenizer.vocab_size}"
        raise DataError(f"{ref.where} holds token {int(ids.max())}; {expected}: write the dataset again")
    ends = np.cumsum(ref.entry.lengths or [len(ids)])
    narrow = np.promote_types(tokenizer.dtype, np.min_scalar_type(tokenizer.eos_id))
    return np.insert(ids.astype(narrow), ends, tokenizer.eos_id)


@dataclass(frozen=True)
class Sample:
    """A sample, split into its fields."""

    name: str
    """Source file, or file and line."""
    fields: tuple[NDArray[Any], ...]
    """Token ids of each field, [n] without end-of-text."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


def make_sample(ref: SampleRef, tokens: Any) -> Sample:
    """Splits the tokens of a whole sample, as returned by `SampleReader.read`, into its fields."""
    entry = ref.entry
    ends = np.cumsum([length + 1 for length in entry.lengths or (entry.n_tokens - 1,)])
    fields = tuple(part[:-1] for part in np.split(tokens, ends[:-1]))
    return Sample(entry.document, fields, entry.metadata)
