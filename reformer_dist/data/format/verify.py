"""Verification of every byte of a dataset against its checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing

from reformer_dist.data.format.cache import FileRef
from reformer_dist.data.format.dataset import Dataset
from reformer_dist.data.format.dataset_layout import SPLITS, Shard
from reformer_dist.data.format.sample_reader import DamagedSampleError, SampleReader, SampleRef
from reformer_dist.errors import DataError


def verify_dataset(dataset: Dataset) -> Iterator[str]:
    """Yields one message per shard, index or sample that is missing or altered."""
    with closing(SampleReader()) as reader:
        for split in SPLITS:
            for shard in dataset.shards(split):
                yield from _verify_shard(dataset, shard, reader)


def _verify_shard(dataset: Dataset, shard: Shard, reader: SampleReader) -> Iterator[str]:
    try:
        with os.fdopen(dataset.folder.open(FileRef(shard.name, shard.size, shard.sha256)), "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != shard.sha256:
            yield f"{dataset.folder.where(shard.name)}: shard was altered after it was written (sha256 differs)"
        refs = [SampleRef(dataset, shard, entry) for entry in dataset.index(shard).entries]
    except DataError as error:
        yield str(error)
        return
    yield from filter(None, (_verify_sample(reader, ref) for ref in refs))


def _verify_sample(reader: SampleReader, ref: SampleRef) -> str | None:
    try:
        reader.read(ref)
    except DamagedSampleError as damaged:
        return f"{ref.where} ({ref.entry.document}) {damaged}"
    except DataError as error:
        return str(error)
    return None
