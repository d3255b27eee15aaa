"""The data order: the samples of each row, a pure function of the seed and the shard indexes.

A pool is a list of shards: all shards of the run or, if datasets are mixed by weight, those of one dataset. Pass
k over a pool permutes its shards by (seed, pool, k), cuts them into groups, and concatenates the groups, with
the samples of each permuted by (seed, pool, k, group). This sequence of tokens, or of samples if a row holds one
sample, is cut into V equal ranges, one per virtual stream (`cut.py`). A position in a stream is therefore one
integer, the units (tokens or samples) before it over all passes, and seeking to it takes no longer in the
thousandth pass than in the first.

The fewer streams there are, the more shards a group has: otherwise a run with few long rows, which takes hundreds
of steps to read a shard, would read one source in all of them.

Only the raw output of a seeded bit generator is used: numpy promises that it never changes, unlike that of
`Generator.permutation`. An order therefore survives upgrades, and no global generator is touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.format.corpus import Corpus, CorpusShard
from reformer_dist.data.format.index import IndexEntry, ShardIndex
from reformer_dist.data.loading.cut import Cut, Era, end_of_packed_passes, end_of_passes
from reformer_dist.errors import DataError

MAX_CACHED_PASSES = 4
INTERLEAVED_SHARDS = 16  # that all streams together read at a time
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: its multiples are spread evenly over the circle
HELDOUT_STREAM = -1  # no training stream has this number


def seeded_bits(seed: int, purpose: str, index: int) -> np.random.PCG64:
    """An independent bit generator for each (seed, purpose, index)."""
    digest = hashlib.blake2b(f"{purpose}/{seed}/{index}".encode(), digest_size=16).digest()
    return np.random.PCG64(int.from_bytes(digest, "little"))


def permutation(length: int, bits: np.random.PCG64) -> NDArray[np.int64]:
    """A random permutation of 0 .. length-1, [length]."""
    return np.argsort(bits.random_raw(length), kind="stable")


class DrawKey(NamedTuple):
    """Seeds the randomness of one row (masked tokens, the window of a context) for any number of ranks."""

    stream: int
    pool: int
    position: int
    """Of the stream in the pool, before the row."""

    @classmethod
    def heldout(cls, row: int) -> DrawKey:
        """Key of a row of a held-out split."""
        return cls(HELDOUT_STREAM, row, 0)

    def bits(self, seed: int, purpose: str) -> np.random.PCG64:
        return seeded_bits(seed, f"{purpose}/{self.stream}/{self.pool}", self.position)


@dataclass(frozen=True)
class _Pass:
    """Groups of a pool's shards in the order of one pass."""

    groups: list[NDArray[np.int64]]
    """Indices of the shards of each group, in order."""
    starts: NDArray[np.int64]
    """[n_groups] units of the pass before each."""


@dataclass(frozen=True)
class ShuffledGroup:
    """Samples of a group of shards in the order of one pass."""

    shards: list[CorpusShard]
    indexes: list[ShardIndex]
    """Of the shards."""
    start: int
    """Units of the pass before the group."""
    size: int
    """Units of the group."""
    samples: NDArray[np.int64]
    """[samples, 2] index of the shard, and of the sample in it, in order."""
    starts: NDArray[np.int64]
    """[samples] units of the group before each."""

    @property
    def end(self) -> int:
        return self.start + self.size

    def sample_at(self, unit: int) -> tuple[CorpusShard, IndexEntry, int]:
        """(shard, sample, units of the sample before it) of a unit of the pass."""
        i = int(np.searchsorted(self.starts, unit - self.start, side="right")) - 1
        shard, sample = self.samples[i].tolist()
        return self.shards[shard], self.indexes[shard].entries[sample], unit - self.start - int(self.starts[i])


class Pool:
    """A list of shards, read pass after pass by V streams."""

    def __init__(
        self,
        number: int,
        shards: list[CorpusShard],
        *,
        seed: int,
        n_streams: int,
        shuffle: bool,
        by_sample: bool,
        interleaved_shards: int = 1,
    ) -> None:
        """interleaved_shards: the most in a group.

        Raises DataError if the shards hold no text or fewer units than there are streams.
        """
        self.number, self.shards, self.by_sample, self.shuffle = number, shards, by_sample, shuffle
        self._seed, self._interleaved_shards = seed, interleaved_shards
        sizes = [s.shard.samples if by_sample else s.shard.tokens for s in shards]
        self._shard_sizes = np.array(sizes, dtype=np.int64)
        self.n_units = int(self._shard_sizes.sum())
        """Tokens, or samples, per pass."""
        if self.n_units < n_streams or not any(s.shard.text_bytes for s in shards):
            where = shards[0].dataset.folder.address if shards else f"data.path[{number}]"
            expected = f"it must hold some for each of the {n_streams} rows of data.batch_size"
            units = "samples" if by_sample else "tokens"
            raise DataError(f"{where}: the training split holds no text, or {self.n_units} {units}; {expected}")
        self._passes: dict[int, _Pass] = {}

    @property
    def digest(self) -> str:
        """Hash of everything but the seed that determines the order of the pool."""
        shards = [[s.shard.name, s.shard.sha256, s.shard.index_sha256] for s in self.shards]
        return hashlib.sha256(repr(shards).encode()).hexdigest()[:16]

    def group_at(self, pass_index: int, unit: int) -> ShuffledGroup:
        """The group of shards that holds a unit of a pass. Raises DataError if an index can't be read."""
        order = self._pass(pass_index)
        i = int(np.searchsorted(order.starts, unit, side="right")) - 1
        numbers = order.groups[i].tolist()
        shards = [self.shards[number] for number in numbers]
        indexes = [shard.index for shard in shards]
        # without interleaving, runs that began before there were groups continue in their order
        purpose = (
            f"samples/{self.number}/{numbers[0]}" if self._interleaved_shards == 1 else f"group/{self.number}/{i}"
        )
        lengths = [len(index.entries) for index in indexes]
        samples = np.column_stack(
            [np.repeat(np.arange(len(shards)), lengths), np.concatenate([np.arange(n) for n in lengths])]
        )
        shuffled = self._permuted(len(samples), purpose, pass_index)
        sizes = np.ones(len(samples), dtype=np.int64)
        if not self.by_sample:
            sizes = np.concatenate([index.n_tokens for index in indexes])[shuffled]
        starts = np.cumsum(sizes) - sizes
        return ShuffledGroup(shards, indexes, int(order.starts[i]), int(sizes.sum()), samples[shuffled], starts)

    def sample_lengths(self, pass_index: int) -> NDArray[np.int64]:
        """Tokens of each sample in the order of a pass, [samples]. Raises DataError if an index can't be read."""
        parts: list[NDArray[np.int64]] = []
        unit = 0
        while unit < self.n_units:
            group = self.group_at(pass_index, unit)
            lengths = [index.n_tokens for index in group.indexes]
            firsts = np.cumsum([0, *map(len, lengths)])
            shard, sample = group.samples.T
            parts.append(np.concatenate(lengths)[firsts[shard] + sample])
            unit = group.end
        return np.concatenate(parts)

    def _pass(self, pass_index: int) -> _Pass:
        order = self._passes.get(pass_index)
        if order is None:
            shards = self._permuted(len(self.shards), f"shards/{self.number}", pass_index)
            groups = np.array_split(shards, -(-len(shards) // self._interleaved_shards))
            sizes = np.array([self._shard_sizes[group].sum() for group in groups])
            order = _Pass(groups, np.cumsum(sizes) - sizes)
            # threads may race, all with the same result; streams are at most a pass apart
            recent = list(self._passes.items())[: MAX_CACHED_PASSES - 1]
            self._passes = {pass_index: order, **dict(recent)}
        return order

    def _permuted(self, length: int, purpose: str, pass_index: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(length)
        return permutation(length, seeded_bits(self._seed, purpose, pass_index))


class Sampler:
    """The data order of a run: its pools, and the pool that each row of a step reads."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        seed: int,
        batch_size: int,
        seq_len: int,
        shuffle: bool = True,
        by_sample: bool = False,
        interleaved_shards: int | None = None,
        pack_samples: bool = False,
    ) -> None:
        """batch_size: rows of a step over all ranks, one stream each. by_sample: rows of one sample each.

        pack_samples: with by_sample, rows of as many samples as fit into seq_len tokens, longer ones cut to that.
        interleaved_shards: whose samples are shuffled together, per stream; by default, as many as make
        INTERLEAVED_SHARDS for all streams.
        """
        self.corpus, self.seed, self.by_sample = corpus, seed, by_sample
        self.n_streams, self.seq_len, self.shuffle = batch_size, seq_len, shuffle
        self.packed_len = seq_len if pack_samples else None
        """Tokens of a row of several samples; None if rows are not packed from samples."""
        if interleaved_shards is None:
            interleaved_shards = -(-INTERLEAVED_SHARDS // batch_size) if shuffle else 1
        self.interleaved_shards = interleaved_shards
        shards = corpus.shards("train")
        groups = [shards]
        if corpus.weights is not None:
            groups = [[s for s in shards if s.dataset_index == i] for i in range(len(corpus.datasets))]
        self.pools = [
            Pool(
                number,
                group,
                seed=seed,
                n_streams=batch_size,
                shuffle=shuffle,
                by_sample=by_sample,
                interleaved_shards=interleaved_shards,
            )
            for number, group in enumerate(groups)
        ]
        self._bounds = np.cumsum(corpus.weights or [1.0])
        self._bounds[-1] = 1.0
        self._phase = int(seeded_bits(seed, "mixing", 0).random_raw())

    def pools_of_step(self, step: int) -> NDArray[np.int64]:
        """Index of the pool that each row of a step reads, [batch_size].

        Rows are spaced evenly over the weights, from a phase that advances by the golden ratio each step. The rows
        of a pool therefore differ from its weight by less than one per step, and by a few at most over a run.
        """
        if len(self.pools) == 1:
            return np.zeros(self.n_streams, dtype=np.int64)
        phase = ((self._phase + step * GOLDEN) % 2**64) / 2**64
        points = (np.arange(self.n_streams) + phase) / self.n_streams
        pools = np.searchsorted(self._bounds, np.minimum(points, np.nextafter(1.0, 0.0)), side="right")
        return pools[permutation(self.n_streams, seeded_bits(self.seed, "mixing", step + 1))]

    @property
    def units_per_row(self) -> int:
        """Tokens or samples; of rows of several samples, the least."""
        return 1 if self.by_sample else self.seq_len

    def last_step(
        self, passes: int, origin: tuple[int, int] = (0, 0), cut: Cut | None = None, eras: Sequence[Era] = ()
    ) -> int:
        """The step that completes `passes` passes over a single pool. See `end_of_passes`.

        eras: of other rows than this sampler's, from the first step of the cut on.
        """
        if self.packed_len is not None:
            if len(eras) > 1:
                raise DataError(
                    "data.epochs: with data.pack_samples=true, rows must not change; use trainer.max_steps"
                )
            pool = self.pools[0]
            return end_of_packed_passes(
                passes, origin, cut or Cut(), self.n_streams, self.packed_len, pool.n_units, pool.sample_lengths
            )
        eras = eras or [Era(None, self.n_streams, self.units_per_row)]
        return end_of_passes(passes, origin, cut or Cut(), self.pools[0].n_units, eras)

    def settings(self) -> dict[str, Any]:
        """Everything else that determines the order, as JSON values."""
        # with one sample per row, the order does not depend on the length of a row
        row: dict[str, Any] = {"seq_len": self.seq_len}
        if self.by_sample:
            row = {"by_sample": True, "packed_len": self.packed_len}
        order = {"shuffle": self.shuffle, "interleaved_shards": self.interleaved_shards}
        return {"seed": self.seed, "batch_size": self.n_streams, **row, **order, "weights": self.corpus.weights}
