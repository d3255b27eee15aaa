"""Quarantine of damaged samples: they are reported when they are first read, and skipped from then on.

Whether a sample is damaged depends on its bytes and the index alone, so all ranks that read it agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from numpy.typing import NDArray

from reformer_dist.data.format.sample_reader import DamagedSampleError, SampleReader, SampleRef
from reformer_dist.errors import DataError

SampleId = tuple[int, str, str]
"""(dataset index, shard name, key)."""


@dataclass(frozen=True)
class DamagedSample:
    """A sample whose bytes differ from those that were written."""

    id: SampleId
    where: str
    """Shard and key, for messages."""
    document: str
    """Source file, or file and line."""
    reason: str

    def __str__(self) -> str:
        return f"{self.where} ({self.document}) {self.reason}"


class Quarantine:
    """Samples to skip, even if they are repaired later. Shared by the reader threads."""

    def __init__(self, n_samples: int, max_fraction: float, known: Iterable[SampleId] = ()) -> None:
        """max_fraction: fraction of the run's `n_samples` that may be damaged before `add` raises."""
        self._max_damaged = int(max_fraction * n_samples)
        self._n_samples, self._max_fraction = n_samples, max_fraction
        self._reasons: dict[SampleId, DamagedSample | None] = dict.fromkeys(known)

    def __contains__(self, sample: SampleId) -> bool:
        return sample in self._reasons

    def add(self, damaged: Iterable[DamagedSample]) -> None:
        """Raises DataError if too many samples are damaged now."""
        last = None
        for last in damaged:
            self._reasons.setdefault(last.id, last)
        if last is not None and len(self._reasons) > self._max_damaged:
            count = f"{len(self._reasons)} of {self._n_samples} samples are damaged"
            limit = f"data.max_damaged_fraction={self._max_fraction:g} allows {self._max_damaged}"
            raise DataError(f"{last}; {count}, and {limit}: copy the shards again, or allow more")

    def reason(self, sample: SampleId) -> DamagedSample | None:
        """The damage of a quarantined sample; None if it was known before this run began."""
        return self._reasons[sample]


class CheckedReader:
    """Reads samples except quarantined ones, and quarantines damaged ones. Not thread-safe."""

    def __init__(self, quarantine: Quarantine) -> None:
        self._quarantine, self._reader = quarantine, SampleReader()
        # streams that read the same long document share its tokens
        self._cached: WeakValueDictionary[SampleId, NDArray[Any]] = WeakValueDictionary()
        self.skipped_samples: list[SampleId] = []
        """Samples skipped since the caller last reset the list."""

    def open(self, dataset_index: int, ref: SampleRef) -> Any:
        """Tokens of a sample, [n_tokens]; None if it is quarantined, by this call or earlier."""
        sample_id = (dataset_index, ref.shard.name, ref.entry.key)
        if sample_id not in self._quarantine:
            tokens = self._cached.get(sample_id)
            if tokens is not None:
                return tokens
            try:
                self._cached[sample_id] = tokens = self._reader.read(ref)
                return tokens
            except DamagedSampleError as damaged:
                self._quarantine.add([DamagedSample(sample_id, ref.where, ref.entry.document, str(damaged))])
        self.skipped_samples.append(sample_id)
        return None

    def close(self) -> None:
        self._reader.close()
