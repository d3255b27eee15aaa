"""All datasets that a run reads: their shards and weights, and their record in a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reformer_dist.data.format.cache import FileCache
from reformer_dist.data.format.dataset import CACHE_FOLDER, CACHE_GB, Dataset
from reformer_dist.data.format.dataset_layout import SPLITS, Shard
from reformer_dist.data.format.index import ShardIndex
from reformer_dist.data.format.storage import RemoteFolder
from reformer_dist.errors import DataError

MAX_SHOWN_CHANGES = 8


@dataclass(frozen=True)
class CorpusShard:
    """A shard of one of the datasets of a corpus."""

    dataset_index: int
    """Index of its dataset in the corpus."""
    dataset: Dataset
    shard: Shard

    @property
    def index(self) -> ShardIndex:
        return self.dataset.index(self.shard)


class Corpus:
    """Datasets with one tokenizer, pooled or mixed by weight."""

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float] | None = None) -> None:
        """weights: relative number of rows from each dataset; None pools the shards of all datasets.

        Raises DataError if tokenizers, labels or numbers of fields differ.
        """
        self.datasets = list(datasets)
        self.weights = None if weights is None else [float(weight) / sum(weights) for weight in weights]
        first = self.datasets[0]
        for other in self.datasets[1:]:
            address, first_address = other.folder.address, first.folder.address
            if (len(other.fields), other.labels) != (len(first.fields), first.labels):
                expected = f"must be those of {first_address}; its samples differ"
                raise DataError(f"data.path: fields and labels of {address} {expected}")
            if other.tokenizer_spec != first.tokenizer_spec:
                expected = f"must be that of {first_address}; write both with one tokenizer"
                raise DataError(f"data.path: the tokenizer of {address} {expected}")
        self.tokenizer, self.labels = first.tokenizer, first.labels

    @classmethod
    def open(
        cls,
        addresses: Sequence[str | Path],
        weights: Sequence[float] | None = None,
        cache_folder: str | Path | None = None,
        cache_gb: float = CACHE_GB,
    ) -> Corpus:
        """Opens the datasets of these folders and URLs. Raises DataError if one is missing or broken."""
        cache = FileCache(cache_folder or CACHE_FOLDER, int(cache_gb * 2**30))
        return cls([Dataset.open(address, cache) for address in addresses], weights)

    def reweighted(self, weights: Sequence[float] | None) -> Corpus:
        """The same datasets, mixed by other weights."""
        return Corpus(self.datasets, weights)

    def wait_for_sources(self, seconds: float) -> None:
        """From now on, requests to a remote source that does not respond are retried for this long."""
        for dataset in self.datasets:
            if isinstance(dataset.folder, RemoteFolder):
                dataset.folder.patience = seconds

    @property
    def where(self) -> str:
        """Addresses of its datasets, for error messages."""
        return ", ".join(dataset.folder.address for dataset in self.datasets)

    def shards(self, split: str) -> list[CorpusShard]:
        """Shards of "train" or "heldout", dataset by dataset, in the order they were written."""
        return [
            CorpusShard(index, dataset, shard)
            for index, dataset in enumerate(self.datasets)
            for shard in dataset.shards(split)
        ]

    def total(self, count: str, split: str) -> int:
        """Sum of a field of Shard (size, samples, tokens, text_bytes) over the shards of a split."""
        return sum(dataset.total(count, split) for dataset in self.datasets)

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of text per training token, weighted like the datasets."""
        if self.weights is None:
            return self.total("text_bytes", "train") / self.total("tokens", "train")
        ratios = [
            dataset.total("text_bytes", "train") / dataset.total("tokens", "train") for dataset in self.datasets
        ]
        return sum(weight * ratio for weight, ratio in zip(self.weights, ratios, strict=True))

    def check(self, split: str, max_damaged_fraction: float) -> Iterator[str]:
        """Yields a warning for each shard whose size differs from the recorded one.

        Samples that a shard lacks count as damaged. Raises DataError if a shard is missing or too many samples are
        lost.
        """
        lost = 0
        for dataset in self.datasets:
            for shard, size in dataset.find_size_mismatches(split):
                problem = f"{dataset.folder.where(shard.name)}: shard holds {size} bytes, expected {shard.size}"
                lost += sum(entry.offset + entry.size > size for entry in dataset.index(shard).entries)
                if lost > max_damaged_fraction * self.total("samples", split):
                    limit = f"data.max_damaged_fraction={max_damaged_fraction:g} allows fewer"
                    lost_samples = f"{lost} samples of the {split} split are lost"
                    raise DataError(f"{problem}; {lost_samples}: {limit}; copy or write it again")
                yield f"{problem}; the samples that it lacks are skipped"

    def record(self) -> dict[str, Any]:
        """Record of the data in a checkpoint, as JSON values: enough to report what has changed since."""
        return {
            "tokenizer": self.datasets[0].tokenizer_spec,
            "weights": self.weights,
            "datasets": [
                {
                    "address": dataset.folder.address,
                    **{
                        split: {s.name: [s.samples, s.sha256[:16]] for s in dataset.shards(split)}
                        for split in SPLITS
                    },
                }
                for dataset in self.datasets
            ],
        }

    @property
    def fingerprint(self) -> str:
        """sha256 of tokenizer, and sizes and checksums of all shards, independent of their addresses.

        Of weights, it only covers whether there are any: they may change during a run.
        """
        return self._digest(self.weights is not None)

    @property
    def fingerprint_with_weights(self) -> str:
        """The fingerprint in states of earlier versions."""
        return self._digest(self.weights)

    def _digest(self, weights: Any) -> str:
        content = [weights, [dataset.fingerprint for dataset in self.datasets]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences between two records of a corpus, one line per shard or dataset, at most MAX_SHOWN_CHANGES."""
    lines = []
    if before["tokenizer"] != now["tokenizer"]:
        lines.append(f"the tokenizer was {before['tokenizer']} and is {now['tokenizer']}")
    if before["weights"] != now["weights"]:
        lines.append(f"data.weights were {before['weights']} and are {now['weights']}")
    old, new = before["datasets"], now["datasets"]
    lines += [f"dataset {dataset['address']} was removed" for dataset in old[len(new) :]]
    lines += [f"dataset {dataset['address']} was added" for dataset in new[len(old) :]]
    for earlier, later in zip(old, new, strict=False):
        for split in SPLITS:
            lines += [f"{later['address']}: {change}" for change in _changed_shards(earlier[split], later[split])]
    n_hidden = len(lines) - MAX_SHOWN_CHANGES
    return lines if n_hidden <= 0 else [*lines[:MAX_SHOWN_CHANGES], f"and {n_hidden} more"]


def _changed_shards(before: Mapping[str, list[Any]], now: Mapping[str, list[Any]]) -> Iterator[str]:
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            yield f"{name} was removed"
        elif name not in before:
            yield f"{name} was added"
        elif before[name] != now[name]:
            yield f"{name} was altered ({before[name][0]} samples, now {now[name][0]})"
    if list(before) != list(now) and before.keys() == now.keys():
        yield "the order of the shards has changed"
