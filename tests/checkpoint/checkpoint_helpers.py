"""Checkpoints of invented parameters, cut over ranks in any way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.threads import on_ranks
from torch import Tensor

from reformer_dist.checkpoint import AsyncSave, prune
from reformer_dist.checkpoint.writer import KINDS
from reformer_dist.distributed.runtime import Runtime

SHAPES = {"matrix": [4, 6], "bias": [5], "scalar": []}


@dataclass(frozen=True)
class Piece:
    """A fragment as the engine would offer it."""

    name: str
    offset: int
    length: int
    adam_step: int = 7

    def values(self, kind: str) -> Tensor:
        return whole(self.name, kind)[self.offset : self.offset + self.length]


def whole(name: str, kind: str) -> Tensor:
    """All elements of a parameter or moment, each different from all others."""
    place = list(SHAPES).index(name) * len(KINDS) + KINDS.index(kind)
    return torch.arange(math.prod(SHAPES[name]), dtype=torch.float32) / 64 + 1000 * place


def cut_evenly(world_size: int) -> list[list[Piece]]:
    """Each parameter cut over all ranks, some of which get nothing of the small ones."""
    ranks: list[list[Piece]] = [[] for _ in range(world_size)]
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        for rank in range(world_size):
            low, high = size * rank // world_size, size * (rank + 1) // world_size
            if low < high:
                ranks[rank].append(Piece(name, low, high - low))
    return ranks


def write(
    root: Path,
    step: int = 1,
    pieces: Sequence[Sequence[Piece]] | None = None,
    *,
    keep: int = 0,
    keep_every: int = 0,
    extra_files: dict[str, bytes] | None = None,
) -> list[Path | Exception]:
    """The folder, or what was or raised on each rank; by default there are two."""
    ranks = cut_evenly(2) if pieces is None else pieces

    def write_one(runtime: Runtime) -> Path:
        run: dict[str, Any] = {"shapes": SHAPES, "made at": step}
        saving = AsyncSave(
            runtime,
            root,
            step,
            ranks[runtime.rank],
            rank_state={"rank": runtime.rank},
            run=run,
            extra_files=extra_files or {},
        )
        folder = saving.finish()
        if runtime.is_main:
            prune(root, folder, keep, keep_every)
        return folder

    return on_ranks(len(ranks), write_one)


def written(root: Path, step: int = 1, **options: Any) -> Path:
    """The folder of a checkpoint that every rank wrote."""
    folders = write(root, step, **options)
    assert all(folder == folders[0] for folder in folders)
    assert isinstance(folders[0], Path)
    return folders[0]
