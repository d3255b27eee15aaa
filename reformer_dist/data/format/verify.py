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
    """One message per shard, index or sample that is missing or altered."""
    for split in SPLITS:
        for shard in dataset.shards(split):
            yield from _verify_shard(dataset, shard)


def _verify_shard(dataset: Dataset, shard: Shard) -> Iterator[str]:
    try:
        yield from _mismatches(dataset, shard)
    except DataError as error:
        yield str(error)


def _mismatches(dataset: Dataset, shard: Shard) -> Iterator[str]:
    with os.fdopen(dataset.folder.open(FileRef(shard.name, shard.size, shard.sha256)), "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != shard.sha256:
        yield f"{dataset.folder.where(shard.name)}: shard was altered after it was written (sha256 differs)"
    with closing(SampleReader()) as reader:
        for entry in dataset.index(shard).entries:
            ref = SampleRef(dataset, shard, entry)
            if problem := _verify_sample(reader, ref):
                yield problem


def _verify_sample(reader: SampleReader, ref: SampleRef) -> str:
    try:
        reader.read(ref)
    except DamagedSampleError as damaged:
        return f"{ref.where} ({ref.entry.document}) {damaged}"
    except DataError as error:
        return str(error)
    return ""
