"""Looks at every byte of a data set: is it still what was written?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing

from reformer_dist.data.format.cache import FileRef
from reformer_dist.data.format.dataset import Dataset
from reformer_dist.data.format.layout import SPLITS, Shard
from reformer_dist.data.format.sample_reader import DamagedSampleError, SampleReader, SampleRef
from reformer_dist.errors import DataError


def verify_dataset(dataset: Dataset) -> Iterator[str]:
    """One line for each shard, index or sample that is missing or altered."""
    for split in SPLITS:
        for shard in dataset.shards(split):
            yield from _damage_of(dataset, shard)


def _damage_of(dataset: Dataset, shard: Shard) -> Iterator[str]:
    try:
        yield from _damage_of_shard(dataset, shard)
    except DataError as error:
        yield str(error)


def _damage_of_shard(dataset: Dataset, shard: Shard) -> Iterator[str]:
    with os.fdopen(dataset.folder.open(FileRef(shard.name, shard.size, shard.sha256)), "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != shard.sha256:
        yield f"{dataset.folder.where(shard.name)}: shard is not what was written (sha256 differs)"
    with closing(SampleReader()) as reader:
        for entry in dataset.index(shard).entries:
            source = SampleRef(dataset, shard, entry)
            if words := _damage_of_sample(reader, source):
                yield words


def _damage_of_sample(reader: SampleReader, source: SampleRef) -> str:
    try:
        reader.read(source)
    except DamagedSampleError as damaged:
        return f"{source.where} ({source.entry.document}) {damaged}"
    except DataError as error:
        return str(error)
    return ""
