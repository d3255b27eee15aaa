"""One sample of a shard, read at its offset and checked; what is not as it was written never becomes tokens.

A sample that is torn or altered by accident is damaged: it can be passed over. A member that no data set holds,
and that could do harm elsewhere (a link, a device, a pickle, a name that leaves the folder, a size beyond the
shard), is refused: somebody put it there. Nothing is unpacked, run or unpickled in either case.
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
from reformer_dist.data.format.index import HEADER_BYTES, IndexEntry, member_name
from reformer_dist.data.format.layout import Shard
from reformer_dist.errors import DataError

PICKLES = (".pkl", ".pickle", ".pyd", ".pth", ".pt", ".npy")
MAX_OPEN_FILES = 32


class DamagedSampleError(Exception):
    """A sample is not what was written; the message says how."""


@dataclass(frozen=True)
class SampleRef:
    """A sample of a data set: where it is, and what it must be."""

    dataset: Dataset
    shard: Shard
    entry: IndexEntry

    @property
    def where(self) -> str:
        """How errors call it."""
        return f"{self.dataset.folder.where(self.shard.name)}: sample {self.entry.key}"


class SampleReader:
    """Reads samples, and keeps the files open that it read last. For use by one thread."""

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[Dataset, str], int] = OrderedDict()

    def read(self, source: SampleRef) -> NDArray[np.unsignedinteger]:
        """Tokens of a sample, [n_tokens] with end-of-text as the last, in as few bytes as the vocabulary takes.

        Raises DamagedSampleError where it is not as it was written, and DataError where its shard is missing, or it
        is one of the things that are refused.
        """
        content = self._read_bytes(source)
        header, payload = content[:HEADER_BYTES], content[HEADER_BYTES:]
        size = source.entry.size
        if len(payload) < size:
            raise DamagedSampleError(f"is torn: {len(payload)} of {size} bytes are there")
        _check_header(header, source)
        if hashlib.sha256(payload).hexdigest() != source.entry.sha256:
            raise DamagedSampleError("is altered: its sha256 differs from the index")
        return _tokens(payload, source)

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _read_bytes(self, source: SampleRef) -> bytes:
        descriptor = self._open(source.dataset, source.shard)
        start, left = source.entry.offset - HEADER_BYTES, HEADER_BYTES + source.entry.size
        content = b""
        try:
            while left > 0 and (more := os.pread(descriptor, left, start + len(content))):
                content += more
                left -= len(more)
        except OSError as error:
            raise DataError(f"{source.where}: can't be read ({error.strerror})") from error
        return content

    def _open(self, dataset: Dataset, shard: Shard) -> int:
        name = (dataset, shard.name)
        if name not in self._files:
            self._files[name] = dataset.folder.open(FileRef(shard.name, shard.size, shard.sha256))
        self._files.move_to_end(name)
        if len(self._files) > MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return self._files[name]


def _check_header(header: bytes, source: SampleRef) -> None:
    try:
        member = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError as error:
        raise DamagedSampleError(f"is altered: its tar header is broken ({error})") from error
    name, where = member.name, source.where
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        raise DataError(f"{where} is named {name!r}; names must be relative and without ..")
    if not member.isreg():
        raise DataError(f"{where} is a link, device or folder in the tar; each sample must be a regular file")
    if name.lower().endswith(PICKLES):
        raise DataError(f"{where} is named {name!r}; what may be a pickle is refused")
    if member.size > source.shard.size:
        raise DataError(f"{where} claims {member.size} bytes; the whole shard holds {source.shard.size}")
    right = member_name(source.entry, source.dataset.tokenizer.dtype)
    if (name, member.size) != (right, source.entry.size):
        raise DamagedSampleError(f"is altered: {name!r} of {member.size} bytes is in its place")


def _tokens(payload: bytes, source: SampleRef) -> NDArray[np.unsignedinteger]:
    tokenizer = source.dataset.tokenizer
    ids = np.frombuffer(payload, dtype=np.dtype(tokenizer.dtype).newbyteorder("<"))
    if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
        right = f"ids must be below {tokenizer.vocab_size}"
        raise DataError(f"{source.where} holds token {int(ids.max())}; {right}: write the data set again")
    ends = np.cumsum(source.entry.lengths or [len(ids)])
    narrow = np.promote_types(tokenizer.dtype, np.min_scalar_type(tokenizer.eos_id))
    return np.insert(ids.astype(narrow), ends, tokenizer.eos_id)


@dataclass(frozen=True)
class Sample:
    """The fields of a sample, apart again."""

    name: str
    """Where it came from."""
    fields: tuple[NDArray[Any], ...]
    """Token ids of each, [n] without an end of text."""
    facts: Mapping[str, Any] = field(default_factory=dict)


def make_sample(source: SampleRef, tokens: Any) -> Sample:
    """tokens: of the whole sample, as a SampleReader gives them."""
    entry = source.entry
    ends = np.cumsum([length + 1 for length in entry.lengths or (entry.n_tokens - 1,)])
    fields = tuple(part[:-1] for part in np.split(tokens, ends[:-1]))
    return Sample(entry.document, fields, entry.facts)
