"""Damaged samples: found once, passed over ever after, and named.

Whether a sample is damaged is decided by its bytes and the index alone, so every rank that reads it decides alike.
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
"""(number of the data set, name of the shard, key)."""


@dataclass(frozen=True)
class DamagedSample:
    """A sample that is not what was written."""

    id: SampleId
    where: str
    """Its shard and key, in words."""
    document: str
    """Name of the file, or file and line, that it came from."""
    reason: str

    def __str__(self) -> str:
        return f"{self.where} ({self.document}) {self.reason}"


class Quarantine:
    """The samples that are passed over, whether or not they are damaged still; shared by threads that read."""

    def __init__(self, n_samples: int, max_share: float, known: Iterable[SampleId] = ()) -> None:
        """`max_share`: of the `n_samples` of the run; one more damaged sample is an error."""
        self._most = int(max_share * n_samples)
        self._n_samples, self._max_share = n_samples, max_share
        self._reasons: dict[SampleId, DamagedSample | None] = dict.fromkeys(known)

    def __contains__(self, sample: SampleId) -> bool:
        return sample in self._reasons

    def add(self, damages: Iterable[DamagedSample]) -> None:
        """Raises DataError where these are too many."""
        last = None
        for last in damages:
            self._reasons.setdefault(last.id, last)
        if last is not None and len(self._reasons) > self._most:
            share = f"{len(self._reasons)} of {self._n_samples} samples are damaged"
            right = f"data.max_damaged_fraction={self._max_share:g} allows {self._most}"
            raise DataError(f"{last}; {share}, and {right}: copy the shards again, or allow more")

    def reason(self, sample: SampleId) -> DamagedSample | None:
        """How a sample is damaged; None where that was known before this run began."""
        return self._reasons[sample]


class CheckedReader:
    """Reads samples around a quarantine. For use by one thread."""

    def __init__(self, quarantine: Quarantine) -> None:
        self._quarantine, self._reader = quarantine, SampleReader()
        # streams whose shares meet in one long document share its tokens
        self._opened: WeakValueDictionary[SampleId, NDArray[Any]] = WeakValueDictionary()
        self.skipped_samples: list[SampleId] = []
        """Samples of which nothing was read, until somebody empties the list."""

    def open(self, data_set: int, source: SampleRef) -> Any:
        """Tokens of a sample, [n_tokens]; None where it is in quarantine, or belongs there from now on."""
        name = (data_set, source.shard.name, source.entry.key)
        if name not in self._quarantine:
            tokens = self._opened.get(name)
            if tokens is not None:
                return tokens
            try:
                self._opened[name] = tokens = self._reader.read(source)
                return tokens
            except DamagedSampleError as damaged:
                self._quarantine.add([DamagedSample(name, source.where, source.entry.document, str(damaged))])
        self.skipped_samples.append(name)
        return None

    def close(self) -> None:
        self._reader.close()
