"""Durable and atomic writes: a file under its final name is complete, even after a crash."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

BLOCK = 2**20


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a temporary file beside `path`, syncs it, and renames it into place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    write_synced(partial, data)
    partial.replace(path)


def write_synced(path: Path, data: bytes | str) -> None:
    """Writes a file in place and syncs it: for the files of a staging directory."""
    with path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def make_staging(folder: Path) -> Path:
    """Creates an empty directory beside `folder`, to be filled and published; replaces one left by a crash."""
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def publish(staging: Path, folder: Path) -> None:
    """Renames a directory whose files are synced to its final name, durably. Replaces `folder` if it exists."""
    sync(staging)
    if folder.exists():
        shutil.rmtree(folder)
    staging.rename(folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Syncs a file's content, or a directory's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
