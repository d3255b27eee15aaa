"""Replay of the samples that each step reads, from the shard indexes alone, without opening a shard."""

from __future__ import annotations

from collections.abc import Set

import numpy as np

from reformer_dist.data.format.quarantine import SampleId
from reformer_dist.data.format.sample_reader import SampleRef
from reformer_dist.data.loading.loader_state import LoaderState, join_digests
from reformer_dist.data.loading.packing import Span, Tokens
from reformer_dist.data.loading.sampler import Sampler


class Replay:
    """All streams of a run, step by step."""

    def __init__(
        self,
        sampler: Sampler,
        state: LoaderState,
        quarantine: Set[SampleId] = frozenset(),
        passes: int | None = None,
    ) -> None:
        """quarantine: samples that the run skipped, besides those of `state`. passes: see `TrainLoader`."""
        self.step = state.step
        """Steps replayed or skipped so far."""
        self.sampler, self._origin, self._cuts = sampler, state.origin, state.cuts
        self._quarantine = quarantine | state.quarantine
        self._streams = [state.open_stream(sampler, stream, passes) for stream in range(sampler.n_streams)]

    def next_step(self) -> list[list[Span]]:
        """The spans of each row of the next step. Raises DataError if an index can't be read."""
        pools = self.sampler.pools_of_step(self.step)
        self.step += 1
        streams = zip(self._streams, pools, strict=True)
        return [stream.next_spans(int(pool), self._token_positions) for stream, pool in streams]

    def skip(self, n_steps: int) -> None:
        """Advances by `n_steps`. With an empty quarantine, reads no index and does not update the hash.

        Rows of several samples are replayed one by one, since their number of samples is not known otherwise.
        """
        if self._quarantine or self.sampler.packed_len is not None:
            for _ in range(n_steps):
                self.next_step()
            return
        rows = np.zeros((self.sampler.n_streams, len(self.sampler.pools)), dtype=np.int64)
        if len(self.sampler.pools) == 1:
            rows += n_steps
        else:
            for step in range(self.step, self.step + n_steps):
                rows[np.arange(self.sampler.n_streams), self.sampler.pools_of_step(step)] += 1
        for stream, counts in zip(self._streams, rows, strict=True):
            stream.skip_rows(counts.tolist())
        self.step += n_steps

    @property
    def state(self) -> LoaderState:
        """The loader state of the run after these steps."""
        streams = {number: (stream.positions, stream.digest) for number, stream in enumerate(self._streams)}
        return LoaderState(self.step, self._origin, streams, frozenset(self._quarantine), self._cuts)

    @property
    def hash(self) -> str:
        """Running hash of all steps replayed one by one, equal to that of a run's state."""
        return join_digests([stream.digest for stream in self._streams])

    def _token_positions(self, dataset_index: int, ref: SampleRef) -> Tokens | None:
        is_damaged = (dataset_index, ref.shard.name, ref.entry.key) in self._quarantine
        return None if is_damaged else range(ref.entry.n_tokens)
