"""Checkpoints of synthetic parameters, split over ranks in any way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support.threads import on_ranks
from torch import Tensor

from reformer_dist.checkpoint import AsyncSave, Fragment, RunRecord, prune
from reformer_dist.checkpoint.fragment import KINDS, MOMENTS
from reformer_dist.distributed.runtime import Runtime

SHAPES = {"matrix": [4, 6], "bias": [5], "scalar": []}
RECORD = RunRecord(config={"data": {"path": "a"}}, tokenizer={"kind": "bytes"}, vocab_size=257, shapes=SHAPES)


def fragment(name: str, offset: int, length: int, adam_step: int = 7) -> Fragment:
    """A fragment as the engine returns it."""
    state = {kind: whole(name, kind) for kind in MOMENTS} | {"step": torch.tensor(float(adam_step))}
    return Fragment(name, offset, length, whole(name, "fp32"), offset, state)


def whole(name: str, kind: str) -> Tensor:
    """All elements of a parameter or moment, each different from all others."""
    number = list(SHAPES).index(name) * len(KINDS) + KINDS.index(kind)
    return torch.arange(math.prod(SHAPES[name]), dtype=torch.float32) / 64 + 1000 * number


def other_states() -> list[list[Fragment]]:
    """Fragments of two ranks under Adafactor, with an average and a frozen parameter."""

    def of(name: str, offset: int, length: int, *moments: str, **factors: Tensor) -> Fragment:
        state = {kind: whole(name, "exp_avg") for kind in moments} | {"step": torch.tensor(7.0)}
        kinds = ("fp32", *moments)
        return Fragment(name, offset, length, whole(name, "fp32"), offset, state, kinds, factors)

    factors = {"row_var": torch.arange(4.0), "col_var": torch.arange(6.0)}
    return [
        [of("matrix", 0, 11, "average", **factors), of("bias", 0, 5, "variance", "average")],
        [of("matrix", 11, 13, "average"), of("scalar", 0, 1)],
    ]


AVERAGED = replace(RECORD, average={"window": None, "updates": 3})


def split_evenly(world_size: int) -> list[list[Fragment]]:
    """Each parameter split over all ranks, some of which get nothing of the small ones."""
    ranks: list[list[Fragment]] = [[] for _ in range(world_size)]
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        for rank in range(world_size):
            low, high = size * rank // world_size, size * (rank + 1) // world_size
            if low < high:
                ranks[rank].append(fragment(name, low, high - low))
    return ranks


def write(
    root: Path,
    step: int = 1,
    fragments: Sequence[Sequence[Fragment]] | None = None,
    *,
    keep: int = 0,
    keep_every: int = 0,
    extra_files: dict[str, bytes] | None = None,
    record: RunRecord = RECORD,
) -> list[Path | Exception]:
    """The directory or error of each rank; by default there are two ranks."""
    ranks = split_evenly(2) if fragments is None else fragments

    def write_one(runtime: Runtime) -> Path:
        saving = AsyncSave(
            runtime,
            root,
            step,
            ranks[runtime.rank],
            rank_state={"rank": runtime.rank},
            record=record,
            extra_files=extra_files or {},
        )
        folder = saving.finish()
        if runtime.is_main:
            prune(root, folder, keep, keep_every)
        return folder

    return on_ranks(len(ranks), write_one)


def written(root: Path, step: int = 1, **options: Any) -> Path:
    """The directory of a checkpoint that every rank wrote."""
    folders = write(root, step, **options)
    assert all(folder == folders[0] for folder in folders)
    assert isinstance(folders[0], Path)
    return folders[0]
