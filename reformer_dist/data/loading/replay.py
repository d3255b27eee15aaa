"""Which samples a step reads, told from the indexes alone: no shard is opened."""

from __future__ import annotations

from collections.abc import Set

import numpy as np

from reformer_dist.data.format.quarantine import SampleId
from reformer_dist.data.format.sample_reader import Source
from reformer_dist.data.loading.packing import Piece, Tokens
from reformer_dist.data.loading.sampler import Order
from reformer_dist.data.loading.state import Start, join_digests


class Replay:
    """All streams of a run, step by step."""

    def __init__(
        self, order: Order, start: Start, quarantine: Set[SampleId] = frozenset(), passes: int | None = None
    ) -> None:
        """`quarantine`: what the run passed over, beside what `start` knows. `passes`: as for the loader."""
        self.step = start.step
        """Steps before the next one."""
        self._order = order
        self._quarantine = quarantine | start.quarantine
        self._streams = [start.open_stream(order, stream, passes) for stream in range(order.n_streams)]

    def next_step(self) -> list[list[Piece]]:
        """The pieces of each row of the next step. Raises DataError where an index can't be read."""
        lanes = self._order.lanes_of(self.step)
        self.step += 1
        return [
            stream.next_pieces(int(lane), self._places) for stream, lane in zip(self._streams, lanes, strict=True)
        ]

    def skip(self, n_steps: int) -> None:
        """Goes on by so many steps: at once, and without the running hash, where nothing is passed over."""
        if self._quarantine:
            for _ in range(n_steps):
                self.next_step()
            return
        rows = np.zeros((self._order.n_streams, len(self._order.lanes)), dtype=np.int64)
        if len(self._order.lanes) == 1:
            rows += n_steps
        else:
            for step in range(self.step, self.step + n_steps):
                rows[np.arange(self._order.n_streams), self._order.lanes_of(step)] += 1
        for stream, counts in zip(self._streams, rows, strict=True):
            moved = zip(stream.positions, counts.tolist(), strict=True)
            stream.positions = [place + count * self._order.row_units for place, count in moved]
        self.step += n_steps

    @property
    def hash(self) -> str:
        """Running hash of all steps that were gone through one by one; that of the state of a run, too."""
        return join_digests([stream.digest for stream in self._streams])

    def _places(self, data_set: int, source: Source) -> Tokens | None:
        known = (data_set, source.shard.name, source.entry.key) in self._quarantine
        return None if known else range(source.entry.n_tokens)
