"""Everything that a checkpoint holds, as tensors that can be compared."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from reformer_dist.checkpoint import CheckpointReader


def read_all(folder: Path, kinds: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """Flat tensors by "<parameter>|<kind>", and the optimizer's step. kinds: all by default."""
    reader = CheckpointReader(folder)
    tensors = {
        f"{name}|{kind}": values
        for name in reader.record.shapes
        for kind, values in reader.read_all(name).items()
        if kinds is None or kind in kinds
    }
    return tensors | {"adam_step": torch.tensor(reader.adam_step)}


def differing(first: Path, second: Path) -> list[str]:
    """Which weights and optimizer states of two checkpoints are not the same, bit for bit."""
    left, right = read_all(first), read_all(second)
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def assert_same(first: Path, second: Path) -> None:
    """Two checkpoints hold the same weights and optimizer state, bit for bit."""
    assert not (names := differing(first, second)), names
