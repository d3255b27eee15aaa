"""Writes a checkpoint: each rank its fragments, then rank 0 the manifest, then a rename publishes it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from reformer_dist.checkpoint.files import (
    FORMAT,
    MANIFEST,
    RUN_FILE,
    json_bytes,
    manifest_entry,
    partial_folder,
    rank_file,
    step_folder,
    step_folders,
    step_of,
)
from reformer_dist.checkpoint.fragment import ELEMENT_SIZE, KINDS, Fragment
from reformer_dist.checkpoint.record import RunRecord
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import CheckpointError, NonFiniteError
from reformer_dist.fs.atomic import publish, write_synced
from reformer_dist.fs.tensors import save_file


class AsyncSave:
    """One save in progress: copied by the constructor, written by a thread, published by `finish`.

    Every rank makes the same calls in the same order. The thread calls no collectives, so it can't interleave with
    those of training. The ranks agree on the outcome in `is_done` and `finish`.
    """

    def __init__(
        self,
        runtime: Runtime,
        root: Path,
        step: int,
        fragments: Sequence[Fragment],
        *,
        rank_state: dict[str, Any],
        record: RunRecord,
        extra_files: dict[str, bytes],
        buffers: dict[str, Tensor] | None = None,
    ) -> None:
        """rank_state: JSON values of this rank. record, extra_files: those of rank 0 are written.

        buffers: host tensors for the copies, allocated by the first save and reused by later ones, which avoids
        page faults. They must not be modified while a save is in progress.

        Raises the same error on every rank: NonFiniteError unless all weights and moments are finite, UserError if
        the directory can't be created or the disk is too full.
        """
        self.step = step
        self._runtime, self._extra_files = runtime, extra_files
        self._final, self._partial = step_folder(root, step), partial_folder(root, step)
        n_elements = sum(t.numel() for fragment in fragments for t in fragment.tensors().values())
        broken = [fragment.name for fragment in fragments if not fragment.is_finite()]
        needed, n_broken = runtime.sum([float(n_elements * ELEMENT_SIZE), float(len(broken))])
        if n_broken:
            names = sorted({name for names in runtime.gather(broken) for name in names})
            where = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
            raise NonFiniteError(f"step {step}: weights or optimizer states are not finite in {where}")
        runtime.on_main(lambda: _prepare_folder(root, self._partial, int(needed)))
        self._record = json_bytes(record.to_json())
        self._error: CheckpointError | None = None
        self._entries: dict[str, Any] = {}  # of this rank's files in the manifest
        tensors = _copy(fragments, {} if buffers is None else buffers)
        index = {
            "fragments": [_index_entry(fragment) for fragment in fragments],
            "adam_step": max((fragment.adam_step for fragment in fragments), default=0),
            "state": rank_state,
        }
        self._thread = threading.Thread(target=self._write, args=(tensors, json_bytes(index)), name="checkpoint")
        self._thread.start()

    def _write(self, tensors: dict[str, Tensor], index: bytes) -> None:
        paths = [self._partial / rank_file(self._runtime.rank, suffix) for suffix in ("safetensors", "json")]
        try:
            save_file(tensors, paths[0])
            write_synced(paths[1], index)
            self._entries = {path.name: manifest_entry(path) for path in paths}
        except SafetensorError as error:  # such as a full disk
            self._error = CheckpointError(f"{paths[0]}: can't be written: {error}")
        except Exception as error:  # any failure must reach the main thread
            self._error = CheckpointError(f"{self._partial}: can't be written: {error or type(error).__name__}")

    @property
    def is_done(self) -> bool:
        """Whether the threads of all ranks have ended, so that `finish` does not block."""
        return self._runtime.sum([float(self._thread.is_alive())])[0] == 0

    def finish(self) -> Path:
        """Waits for all ranks and publishes the checkpoint. Raises the same error on every rank."""
        runtime = self._runtime
        self._thread.join()
        try:
            runtime.raise_together(self._error)
            entries = runtime.gather(self._entries)
            runtime.on_main(lambda: self._publish(entries))
        except Exception:
            if runtime.is_main:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise
        return self._final

    def _publish(self, entries: list[dict[str, Any]]) -> None:
        """Writes rank 0's files and the manifest, then renames the directory. entries: of each rank's files."""
        shared_files = {RUN_FILE: self._record, **self._extra_files}
        for name, content in shared_files.items():
            write_synced(self._partial / name, content)
        files = {name: entry for rank_entries in entries for name, entry in rank_entries.items()}
        files.update({name: manifest_entry(self._partial / name) for name in shared_files})
        manifest = {"format": FORMAT, "step": self.step, "world_size": len(entries), "files": files}
        write_synced(self._partial / MANIFEST, json_bytes(manifest))
        publish(self._partial, self._final)


def _prepare_folder(root: Path, partial: Path, needed: int) -> None:
    """Creates an empty directory on a disk with `needed` free bytes. Removes leftovers of killed saves."""
    for leftover in root.glob(partial_folder(root, 0).name.replace("0" * 8, "*")):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < needed:
        partial.rmdir()
        raise CheckpointError(f"{root}: a checkpoint needs {needed:,} bytes, and {free:,} are free on its disk")


def _copy(fragments: Sequence[Fragment], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of all fragments by name in the file, in `buffers` where shapes match."""
    copies: dict[str, Tensor] = {}
    for fragment in fragments:
        for kind, values in fragment.tensors().items():
            key = f"{fragment.name}|{kind}"
            buffer = buffers.get(key)
            if buffer is None or buffer.shape != values.shape:
                buffer = torch.empty(values.shape)
            copies[key] = buffer.copy_(values)
    buffers.update(copies)
    return copies


def _index_entry(fragment: Fragment) -> dict[str, Any]:
    """Name and range of a fragment; and its kinds of tensors and sizes of factors, where AdamW has others."""
    entry: dict[str, Any] = {"name": fragment.name, "offset": fragment.offset, "length": fragment.length}
    if fragment.kinds != KINDS:
        entry["kinds"] = list(fragment.kinds)
    if fragment.factors:
        entry["factors"] = {kind: factor.numel() for kind, factor in fragment.factors.items()}
    return entry


def prune(
    root: Path,
    newest: Path,
    keep: int,
    keep_every: int,
    candidates: list[Path] | None = None,
    best_step: int | None = None,
) -> list[Path]:
    """Removes all but the last `keep` checkpoints up to `newest` (0: removes none); returns the removed ones.

    Multiples of `keep_every` steps (0: no such rule) and `best_step` are kept. Checkpoints other than `candidates`
    (default: all under `root`) are neither counted nor removed.
    """
    if keep == 0:
        return []
    # later ones are damaged or of an abandoned branch of the run: they must not displace `newest`
    counted = [folder for folder in candidates or step_folders(root) if step_of(folder) <= step_of(newest)]
    old = [folder for folder in counted[:-keep] if not keep_every or step_of(folder) % keep_every]
    old = [folder for folder in old if step_of(folder) != best_step]
    for folder in old:
        shutil.rmtree(folder, ignore_errors=True)
    return old
