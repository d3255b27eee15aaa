"""Writing a checkpoint: every rank its fragments, then rank 0 the manifest, then the rename that makes it true."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from reformer_dist.checkpoint.files import (
    FORMAT,
    MANIFEST,
    PREFIX,
    RUN_FILE,
    fingerprint,
    partial_folder,
    rank_file,
    step_folder,
    sync,
    write_bytes,
    write_json,
)
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import CheckpointError

KINDS = ("fp32", "exp_avg", "exp_avg_sq")


class SavedFragment(Protocol):
    """A run of a flattened parameter that this rank owns."""

    @property
    def name(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def adam_step(self) -> int: ...

    def values(self, kind: str) -> Tensor: ...


def write_checkpoint(
    runtime: Runtime,
    root: Path,
    step: int,
    fragments: Sequence[SavedFragment],
    *,
    rank_state: dict[str, Any],
    run: dict[str, Any],
    extra_files: dict[str, bytes],
    keep: int,
) -> Path:
    """Writes root/step-<step> from all ranks, prunes all but the newest `keep` (0: none), returns the folder.

    rank_state: JSON of this rank; run and extra_files: rank 0's. On any rank's failure every rank raises the
    same error, and what existed before still does.
    """
    final, partial = step_folder(root, step), partial_folder(root, step)
    runtime.on_main(lambda: _make_empty(partial))
    try:
        files = runtime.gather(runtime.together(lambda: _write_rank(partial, runtime.rank, fragments, rank_state)))
        runtime.on_main(lambda: _finish(partial, final, step, files, run, extra_files))
    except Exception:
        if runtime.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if runtime.is_main and keep > 0:
        # later ones are damaged or of an abandoned course: they must not push this one out
        course = sorted(folder for folder in root.glob(f"{PREFIX}*") if folder <= final)
        for old in course[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_rank(
    folder: Path, rank: int, fragments: Sequence[SavedFragment], rank_state: dict[str, Any]
) -> dict[str, Any]:
    """Writes this rank's two files; returns their fingerprints by name."""
    tensors: dict[str, Tensor] = {}
    places = []
    for fragment in fragments:
        places.append({"name": fragment.name, "offset": fragment.offset, "length": fragment.length})
        for kind in KINDS:
            values = fragment.values(kind).detach().to(device="cpu", dtype=torch.float32)
            # a view into a large flat tensor would be saved with all of its storage
            tensors[f"{fragment.name}|{kind}"] = values.clone()
    adam_step = max((fragment.adam_step for fragment in fragments), default=0)
    weights, index = folder / rank_file(rank, "safetensors"), folder / rank_file(rank, "json")
    try:
        save_file(tensors, weights)
    except SafetensorError as error:  # such as a full disk
        raise CheckpointError(f"{weights}: can't be written: {error}") from error
    sync(weights)
    write_json(index, {"fragments": places, "adam_step": adam_step, "state": rank_state})
    return {path.name: fingerprint(path) for path in (weights, index)}


def _finish(
    partial: Path,
    final: Path,
    step: int,
    files: list[dict[str, Any]],
    run: dict[str, Any],
    extra_files: dict[str, bytes],
) -> None:
    """Rank 0's files, the manifest over all of them, and the rename."""
    write_json(partial / RUN_FILE, run)
    for name, data in extra_files.items():
        write_bytes(partial / name, data)
    listed = {name: mark for of_rank in files for name, mark in of_rank.items()}
    listed.update({name: fingerprint(partial / name) for name in (RUN_FILE, *extra_files)})
    write_json(partial / MANIFEST, {"format": FORMAT, "step": step, "world_size": len(files), "files": listed})
    sync(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync(final.parent)
