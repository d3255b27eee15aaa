"""The folder in which a dataset is written before it is moved into place, and what is kept there for a resume."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reformer_dist.data.format.dataset_layout import (
    DATASET_FILE,
    FORMAT_VERSION,
    TOKENIZER_FILE,
    Shard,
    json_sha256,
    parse_json,
    write_json,
)
from reformer_dist.data.format.tokenizer import Tokenizer
from reformer_dist.errors import DataError
from reformer_dist.fs.lock import LOCK_FILE, acquire_lock

STAGING_FOLDER = ".writing"
BATCH_FOLDER, INDEX_FOLDER = "batches", "indexes"
TEXT_MEMBER = "text_member"
"""Key of dataset.json if the shards are tar files of another program."""


def require_no_dataset(folder: Path, overwrite: bool, names: Iterable[str] = (DATASET_FILE,)) -> None:
    """Raises DataError if a folder holds one of these files and must not be overwritten."""
    if not overwrite and any((folder / name).exists() for name in names):
        raise DataError(f"{folder}: already holds a dataset; give another folder, or --overwrite to replace it")


def refuse_tar_files_of_others(folder: Path) -> None:
    """Raises DataError if the dataset in a folder is an index of tar files, which an overwrite would remove."""
    path = folder / DATASET_FILE
    if path.is_file() and TEXT_MEMBER in parse_json(path.read_bytes(), str(path)):
        raise DataError(f"{folder}: is an index of tar files, which would be removed; give another folder")


def has_finished_work(folder: Path) -> bool:
    """Whether an interrupted command left work in its output folder that the same command continues."""
    staging = folder / STAGING_FOLDER
    return any((staging / BATCH_FOLDER).glob("*.json")) or any((staging / INDEX_FOLDER).glob("*.done"))


@contextmanager
def staging_folder(folder: Path, resume: bool) -> Iterator[Path]:
    """A folder for one process. resume: finished work of an earlier process is kept, and that of this one.

    Raises DataError if the folder can't be written, or if another process writes there.
    """
    staging = folder / STAGING_FOLDER
    lock = None
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(staging / LOCK_FILE)
        if lock is None:
            raise DataError(f"{folder}: another process writes a dataset there; wait, or give another folder")
        for path in staging.iterdir():  # of a killed process
            if path.is_dir() and not resume:
                shutil.rmtree(path)
            elif path.is_file() and path.name != LOCK_FILE:
                path.unlink()
        yield staging
    except OSError as error:
        raise DataError(
            f"{folder}: can't be written ({error}); it must be a writable folder with free space, or not exist"
        ) from error
    finally:
        if lock is not None:
            if not (resume and has_finished_work(folder)):
                shutil.rmtree(staging, ignore_errors=True)
            os.close(lock)


def dataset_record(
    splits: Mapping[str, Sequence[Shard]], tokenizer: Tokenizer, staging: Path, more: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of dataset.json. Writes the files of the tokenizer."""
    return {
        "format": FORMAT_VERSION,
        "tokenizer": tokenizer.save(staging),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "dtype": tokenizer.dtype,
        **more,
        "splits": {split: [shard.to_json() for shard in shards] for split, shards in splits.items()},
    }


def publish(staging: Path, folder: Path, record: dict[str, Any], replaced: Iterable[str]) -> None:
    """Moves the files of a dataset into place. replaced: names of older ones, which are removed."""
    # dataset.json is removed first, so that a mixture of the old and the new dataset never opens
    for name in (DATASET_FILE, TOKENIZER_FILE, *replaced):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(staging.iterdir()):
        if path.is_file() and path.name != LOCK_FILE:
            path.replace(folder / path.name)
    write_json(folder / DATASET_FILE, {**record, "sha256": json_sha256(record)})
