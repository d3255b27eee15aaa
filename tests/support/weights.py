"""Everything that a checkpoint holds, as tensors that can be compared."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from reformer_dist.checkpoint import CheckpointReader
from reformer_dist.checkpoint.fragment import KINDS


def read_all(folder: Path, kinds: tuple[str, ...] = KINDS) -> dict[str, Tensor]:
    """Flat tensors by "<parameter>|<kind>", and Adam's step."""
    reader = CheckpointReader(folder)
    tensors = {
        f"{name}|{kind}": reader.read(name, kind, 0, math.prod(shape))
        for name, shape in reader.record.shapes.items()
        for kind in kinds
    }
    return tensors | {"adam_step": torch.tensor(reader.adam_step)}


def differing(first: Path, second: Path) -> list[str]:
    """Which weights and optimizer states of two checkpoints are not the same, bit for bit."""
    left, right = read_all(first), read_all(second)
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def assert_same(first: Path, second: Path) -> None:
    """Two checkpoints hold the same weights and optimizer state, bit for bit."""
    assert not differing(first, second)
