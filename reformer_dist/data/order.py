"""The order of everything drawn, as a pure function of the seed.

Only the raw output of a seeded bit generator is used: numpy promises it never changes, which it does not
promise for `Generator.permutation`. So an order outlives upgrades, and no global generator is touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Item = TypeVar("Item")


def seeded_bits(seed: int, purpose: str, index: int) -> np.random.PCG64:
    """A bit generator of its own for each (seed, purpose, index)."""
    digest = hashlib.blake2b(f"{purpose}/{seed}/{index}".encode(), digest_size=16).digest()
    return np.random.PCG64(int.from_bytes(digest, "little"))


def permutation(length: int, bits: np.random.PCG64) -> NDArray[np.int64]:
    """The numbers 0 .. length-1 in a drawn order, [length]."""
    return np.argsort(bits.random_raw(length), kind="stable")


def shuffled(items: Iterable[Item], buffer: int, bits: np.random.PCG64) -> Iterator[Item]:
    """The items in an order drawn among `buffer` of them at a time; a buffer of 1 keeps their order."""
    held: list[Item] = []
    for item in items:
        if len(held) < buffer:
            held.append(item)
            continue
        place = _below(len(held), bits)
        yield held[place]
        held[place] = item
    while held:
        place = _below(len(held), bits)
        held[place], held[-1] = held[-1], held[place]
        yield held.pop()


def _below(limit: int, bits: np.random.PCG64) -> int:
    # 64 bits against a buffer's length: the modulo's bias is beyond measuring
    return int(bits.random_raw()) % limit


class ShardOrder:
    """The endless sequence of shards: perm(seed, epoch 0), then perm(seed, epoch 1), and so on."""

    def __init__(self, seed: int, n_shards: int) -> None:
        self.seed = seed
        self.n_shards = n_shards
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def shard_at(self, index: int) -> int:
        """Which shard is element `index` of the sequence."""
        epoch, place = divmod(index, self.n_shards)
        if epoch not in self._epochs:
            if len(self._epochs) >= 8:  # streams drift apart by an epoch or two; older ones are done with
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = permutation(self.n_shards, seeded_bits(self.seed, "shards", epoch))
        return int(self._epochs[epoch][place])
