"""Which samples each row reads, as a pure function of the seed and the indexes.

A lane is a pool of shards: all of the run, or those of one data set where data sets are mixed by weight. Pass k
over a lane is its shards one after another, permuted by (seed, lane, k), with the samples of each permuted by
(seed, lane, k, shard). Seen as a row of tokens, or of samples where a row of a step holds one sample, it is cut
into V equal shares, one for each virtual stream. So a place in a stream is one number, the tokens or samples that
lie before it over all passes, and finding it takes no longer in the thousandth pass than in the first.

Only the raw output of a seeded bit generator is used: numpy promises it never changes, which it does not promise
for `Generator.permutation`. So an order outlives upgrades, and no global generator is touched.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.format.corpus import Corpus, Part
from reformer_dist.data.format.index import ShardIndex
from reformer_dist.errors import DataError

KEPT_PASSES = 4
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: its multiples fill the circle evenly


def seeded_bits(seed: int, purpose: str, index: int) -> np.random.PCG64:
    """A bit generator of its own for each (seed, purpose, index)."""
    digest = hashlib.blake2b(f"{purpose}/{seed}/{index}".encode(), digest_size=16).digest()
    return np.random.PCG64(int.from_bytes(digest, "little"))


def permutation(length: int, bits: np.random.PCG64) -> NDArray[np.int64]:
    """The numbers 0 .. length-1 in a drawn order, [length]."""
    return np.argsort(bits.random_raw(length), kind="stable")


@dataclass(frozen=True)
class _Pass:
    """The shards of a lane in the order of one pass."""

    shards: NDArray[np.int64]
    """[n_shards]: which shard comes at each place."""
    starts: NDArray[np.int64]
    """[n_shards]: units before each place, which are tokens or samples."""


@dataclass(frozen=True)
class ShuffledShard:
    """The samples of a shard in the order of one pass."""

    part: Part
    index: ShardIndex
    start: int
    """Units of the pass before it."""
    size: int
    """Units of it."""
    samples: NDArray[np.int64]
    """[samples]: which sample comes at each place."""
    starts: NDArray[np.int64]
    """[samples]: units of the shard before each place."""

    @property
    def end(self) -> int:
        return self.start + self.size


class Lane:
    """A pool of shards, read pass after pass by V streams."""

    def __init__(
        self, number: int, parts: list[Part], *, seed: int, n_streams: int, shuffle: bool, by_sample: bool
    ) -> None:
        """Raises DataError where the shards hold fewer units than there are streams."""
        self.number, self.parts, self.by_sample, self.shuffle = number, parts, by_sample, shuffle
        self._seed, self._n_streams = seed, n_streams
        sizes = [part.shard.samples if by_sample else part.shard.tokens for part in parts]
        self._shard_sizes = np.array(sizes, dtype=np.int64)
        self.n_units = int(self._shard_sizes.sum())
        """Tokens, or samples, of one pass."""
        if self.n_units < n_streams or not any(part.shard.text_bytes for part in parts):
            where = parts[0].dataset.folder.address if parts else f"data.path[{number}]"
            right = f"it must hold some, for each of the {n_streams} rows of data.batch_size"
            units = "samples" if by_sample else "tokens"
            raise DataError(f"{where}: the training split holds no text, or {self.n_units} {units}; {right}")
        self._passes: dict[int, _Pass] = {}

    @property
    def digest(self) -> str:
        """Of all that decides the order of the lane but the seed."""
        names = [[part.shard.name, part.shard.sha256, part.shard.index_sha256] for part in self.parts]
        return hashlib.sha256(repr(names).encode()).hexdigest()[:16]

    def share(self, stream: int) -> tuple[int, int]:
        """(first unit, units) of a pass that a stream reads."""
        first = self.n_units * stream // self._n_streams
        return first, self.n_units * (stream + 1) // self._n_streams - first

    def shard_at(self, number: int, unit: int) -> ShuffledShard:
        """The shard that holds a unit of pass `number`. Raises DataError where its index can't be read."""
        order = self._pass(number)
        place = int(np.searchsorted(order.starts, unit, side="right")) - 1
        shard = int(order.shards[place])
        part = self.parts[shard]
        index = part.index
        samples = self._permuted(len(index.entries), f"samples/{self.number}/{shard}", number)
        sizes = np.ones_like(samples) if self.by_sample else index.n_tokens[samples]
        starts = np.cumsum(sizes) - sizes
        return ShuffledShard(part, index, int(order.starts[place]), int(sizes.sum()), samples, starts)

    def _pass(self, number: int) -> _Pass:
        found = self._passes.get(number)
        if found is None:
            shards = self._permuted(len(self.parts), f"shards/{self.number}", number)
            sizes = self._shard_sizes[shards]
            found = _Pass(shards, np.cumsum(sizes) - sizes)
            # several threads may do this at once, each with the same result; streams are at most a pass apart
            self._passes = {number: found, **dict(list(self._passes.items())[: KEPT_PASSES - 1])}
        return found

    def _permuted(self, length: int, purpose: str, number: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(length)
        return permutation(length, seeded_bits(self._seed, purpose, number))


class Order:
    """The order of a run: its lanes, and which of them each row of a step reads."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        seed: int,
        batch_size: int,
        seq_len: int,
        shuffle: bool = True,
        by_sample: bool = False,
    ) -> None:
        """`batch_size`: rows of a step over all ranks, each of which is a stream of its own.

        `by_sample`: a row holds one sample; else seq_len tokens of text.
        """
        self.corpus, self.seed, self.by_sample = corpus, seed, by_sample
        self.n_streams, self.seq_len, self.shuffle = batch_size, seq_len, shuffle
        parts = corpus.parts("train")
        pools = [parts]
        if corpus.weights is not None:
            pools = [[part for part in parts if part.number == each] for each in range(len(corpus.datasets))]
        self.lanes = [
            Lane(number, pool, seed=seed, n_streams=batch_size, shuffle=shuffle, by_sample=by_sample)
            for number, pool in enumerate(pools)
        ]
        self._bounds = np.cumsum(corpus.weights or [1.0])
        self._bounds[-1] = 1.0
        self._phase = int(seeded_bits(seed, "mixing", 0).random_raw())

    def lanes_of(self, step: int) -> NDArray[np.int64]:
        """[batch_size]: the lane that each row of a step reads.

        The rows are spaced evenly over the weights, from a phase that moves on by the golden ratio. So a step
        is never a row away from its due share of a lane, nor is a run more than a few.
        """
        if len(self.lanes) == 1:
            return np.zeros(self.n_streams, dtype=np.int64)
        phase = ((self._phase + step * GOLDEN) % 2**64) / 2**64
        points = (np.arange(self.n_streams) + phase) / self.n_streams
        lanes = np.searchsorted(self._bounds, np.minimum(points, np.nextafter(1.0, 0.0)), side="right")
        return lanes[permutation(self.n_streams, seeded_bits(self.seed, "mixing", step + 1))]

    @property
    def row_units(self) -> int:
        """Units of a lane that a row takes."""
        return 1 if self.by_sample else self.seq_len

    def steps_of(self, passes: int) -> int:
        """Steps after which every token of so many passes over a single lane was predicted once."""
        longest = -(-self.lanes[0].n_units // self.n_streams)
        return -(-passes * longest // self.row_units)

    def settings(self) -> dict[str, Any]:
        """What else decides the order, as JSON values."""
        # how long a row may get does not decide which samples it reads
        row = {"by_sample": True} if self.by_sample else {"seq_len": self.seq_len}
        return {"seed": self.seed, "batch_size": self.n_streams, **row, "shuffle": self.shuffle}
