"""The documents of one shard, read by webdataset's tar iterator from a local file.

Nothing is fetched, run or unpickled: a member is the bytes of one document's token ids, or it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import tar_file_iterator

from reformer_dist.data.dataset import Dataset
from reformer_dist.data.layout import MEMBER_SUFFIX, Shard
from reformer_dist.data.order import seeded_bits, shuffled
from reformer_dist.errors import DataError


@dataclass(frozen=True)
class _Sample:
    """A document as it lies in the shard; it becomes tokens only when its turn comes, to save memory."""

    number: int
    payload: bytes


def read_documents(dataset: Dataset, shard: Shard) -> Iterator[NDArray[np.int32]]:
    """Tokens of each document of a shard in its own order, [n_tokens] with end-of-text as the last.

    Raises DataError, naming shard and sample, where the shard is missing, torn, or holds anything else.
    """
    for sample in _read_samples(dataset, shard):
        yield _tokens(dataset, shard, sample)


def read_shuffled_documents(
    dataset: Dataset, shard: Shard, *, shuffle_buffer: int, seed: int, index: int, skip: int = 0
) -> Iterator[NDArray[np.int32]]:
    """Like `read_documents`, in an order drawn from (seed, index) among `shuffle_buffer` documents at a time.

    The first `skip` documents of that order are left out; they are read, but not turned into tokens.
    """
    bits = seeded_bits(seed, "documents", index)
    for place, sample in enumerate(shuffled(_read_samples(dataset, shard), shuffle_buffer, bits)):
        if place >= skip:
            yield _tokens(dataset, shard, sample)


def _read_samples(dataset: Dataset, shard: Shard) -> Iterator[_Sample]:
    path = dataset.folder / shard.name
    suffix = MEMBER_SUFFIX[dataset.tokenizer.dtype]
    number = n_tokens = 0
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(
            f"{path}: shard can't be opened ({error.strerror}); it must hold {shard.size} bytes"
        ) from error
    with file:
        members = tar_file_iterator(file)
        while (member := _next_member(members, path, number)) is not None:
            _check_member_name(member["fname"], suffix, path, number)
            payload = member["data"]
            yield _Sample(number, payload)
            number += 1
            n_tokens += len(payload) // np.dtype(dataset.tokenizer.dtype).itemsize + 1
    # a tar that is torn between two members just seems to end
    if (number, n_tokens) != (shard.samples, shard.tokens):
        expected = f"expected {shard.samples} samples and {shard.tokens} tokens"
        raise DataError(
            f"{path}: shard holds {number} samples and {n_tokens} tokens, {expected}; it is torn or altered"
        )


def _next_member(members: Iterator[dict[str, Any]], path: Path, number: int) -> dict[str, Any] | None:
    try:
        return next(members, None)
    except Exception as error:  # tarfile, zlib and webdataset each raise their own kinds
        raise DataError(
            f"{path}: sample {number} can't be read ({error}); the shard is torn or altered"
        ) from error


def _check_member_name(name: str, suffix: str, path: Path, number: int) -> None:
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\\" in name:
        raise DataError(f"{path}: sample {number} is named {name!r}; names must be relative and without ..")
    if "." not in parts[-1] or parts[-1].split(".", 1)[1] != suffix:
        raise DataError(f"{path}: sample {number} is named {name!r}; this data set's samples end with .{suffix}")


def _tokens(dataset: Dataset, shard: Shard, sample: _Sample) -> NDArray[np.int32]:
    tokenizer = dataset.tokenizer
    stored = np.dtype(tokenizer.dtype).newbyteorder("<")
    where = f"{dataset.folder / shard.name}: sample {sample.number}"
    if len(sample.payload) % stored.itemsize:
        raise DataError(
            f"{where} holds {len(sample.payload)} bytes; they must be whole ids of {stored.itemsize} bytes"
        )
    ids = np.frombuffer(sample.payload, dtype=stored)
    if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
        raise DataError(f"{where} holds token {int(ids.max())}; ids must be below {tokenizer.vocab_size}")
    tokens = np.empty(len(ids) + 1, dtype=np.int32)
    tokens[:-1] = ids
    tokens[-1] = tokenizer.eos_id
    return tokens
