"""Writing a checkpoint: every rank its fragments, then rank 0 the manifest, then the rename that makes it true."""

from __future__ import annotations

import shutil
import threading
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
    RUN_FILE,
    fingerprint,
    json_bytes,
    partial_folder,
    rank_file,
    step_folder,
    step_folders,
    step_of,
    sync,
    write_bytes,
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


class Saving:
    """A checkpoint in the making: copied when this is made, written by a thread, true after `finish`.

    Every rank makes the same calls in the same order. The thread takes part in no collective, so that it can't
    get between those of training; the ranks agree on what became of it in `is_done` and `finish`.
    """

    def __init__(
        self,
        runtime: Runtime,
        root: Path,
        step: int,
        fragments: Sequence[SavedFragment],
        *,
        rank_state: dict[str, Any],
        run: dict[str, Any],
        extra_files: dict[str, bytes],
        copies: dict[str, Tensor] | None = None,
    ) -> None:
        """rank_state: JSON of this rank; run and extra_files: rank 0's.

        copies: where the tensors are copied to, filled by the first save that is given it and used again by the
        next, which then need not wait for fresh memory; not to be used while a save is under way.

        Raises an error alike on every rank where the folder can't be made or the disk has not the room.
        """
        self.step = step
        self._runtime, self._extra_files = runtime, extra_files
        self._final, self._partial = step_folder(root, step), partial_folder(root, step)
        needed = runtime.sum([float(sum(fragment.length for fragment in fragments) * len(KINDS) * 4)])[0]
        runtime.on_main(lambda: _make_room(root, self._partial, int(needed)))
        self._run = json_bytes(run)
        self._error: CheckpointError | None = None
        self._marks: dict[str, Any] = {}
        tensors = _copy(fragments, {} if copies is None else copies)
        index = json_bytes(_index(fragments, rank_state))
        self._thread = threading.Thread(target=self._write, args=(tensors, index), name="checkpoint")
        self._thread.start()

    def _write(self, tensors: dict[str, Tensor], index: bytes) -> None:
        try:
            self._marks = _write_rank(self._partial, self._runtime.rank, tensors, index)
        except CheckpointError as error:
            self._error = error
        except Exception as error:  # whatever it is, the main thread has to hear of it
            self._error = CheckpointError(f"{self._partial}: can't be written: {error or type(error).__name__}")

    @property
    def is_done(self) -> bool:
        """Whether the threads of all ranks have ended, so that `finish` waits for nothing."""
        return self._runtime.sum([float(self._thread.is_alive())])[0] == 0

    def finish(self) -> Path:
        """Waits for all ranks, and gives the checkpoint its name. Raises an error alike on every rank."""
        runtime = self._runtime
        self._thread.join()
        try:
            runtime.raise_together(self._error)
            marks = runtime.gather(self._marks)
            runtime.on_main(
                lambda: _finish(self._partial, self._final, self.step, marks, self._run, self._extra_files)
            )
        except Exception:
            if runtime.is_main:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise
        return self._final


def _make_room(root: Path, partial: Path, needed: int) -> None:
    """An empty folder to write into, on a disk with `needed` bytes left; what a killed save left is removed."""
    for left in root.glob(partial_folder(root, 0).name.replace("0" * 8, "*")):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < needed:
        partial.rmdir()
        raise CheckpointError(f"{root}: a checkpoint needs {needed:,} bytes, and {free:,} are free on its disk")


def _copy(fragments: Sequence[SavedFragment], copies: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that training does not change, by their names in the file; lies in `copies` where it fits."""
    kept: dict[str, Tensor] = {}
    for fragment in fragments:
        for kind in KINDS:
            key, values = f"{fragment.name}|{kind}", fragment.values(kind).detach()
            place = copies.get(key)
            if place is None or place.shape != values.shape:
                place = torch.empty(values.shape)
            kept[key] = place.copy_(values)
    copies.update(kept)
    return kept


def _index(fragments: Sequence[SavedFragment], rank_state: dict[str, Any]) -> dict[str, Any]:
    places = [{"name": each.name, "offset": each.offset, "length": each.length} for each in fragments]
    adam_step = max((fragment.adam_step for fragment in fragments), default=0)
    return {"fragments": places, "adam_step": adam_step, "state": rank_state}


def _write_rank(folder: Path, rank: int, tensors: dict[str, Tensor], index: bytes) -> dict[str, Any]:
    """Writes this rank's two files; returns their fingerprints by name."""
    weights, beside = folder / rank_file(rank, "safetensors"), folder / rank_file(rank, "json")
    try:
        save_file(tensors, weights)
    except SafetensorError as error:  # such as a full disk
        raise CheckpointError(f"{weights}: can't be written: {error}") from error
    sync(weights)
    write_bytes(beside, index)
    return {path.name: fingerprint(path) for path in (weights, beside)}


def prune(root: Path, newest: Path, keep: int, keep_every: int, counted: list[Path] | None = None) -> list[Path]:
    """Removes all but the last `keep` checkpoints up to `newest` (0: none is removed); returns what it removed.

    Those of steps that `keep_every` divides stay (0: no such). counted: all that are looked at; the others
    neither count nor go.
    """
    if keep == 0:
        return []
    # later ones are damaged or of an abandoned course: they must not push this one out
    course = [folder for folder in counted or step_folders(root) if step_of(folder) <= step_of(newest)]
    old = [folder for folder in course[:-keep] if not keep_every or step_of(folder) % keep_every]
    for folder in old:
        shutil.rmtree(folder, ignore_errors=True)
    return old


def _finish(
    partial: Path,
    final: Path,
    step: int,
    files: list[dict[str, Any]],
    run: bytes,
    extra_files: dict[str, bytes],
) -> None:
    """Rank 0's files, the manifest over all of them, and the rename."""
    write_bytes(partial / RUN_FILE, run)
    for name, data in extra_files.items():
        write_bytes(partial / name, data)
    listed = {name: mark for of_rank in files for name, mark in of_rank.items()}
    listed.update({name: fingerprint(partial / name) for name in (RUN_FILE, *extra_files)})
    manifest = {"format": FORMAT, "step": step, "world_size": len(files), "files": listed}
    write_bytes(partial / MANIFEST, json_bytes(manifest))
    sync(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync(final.parent)
