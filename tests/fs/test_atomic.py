"""Atomic writes and locks: readers see the old content or the new, and never a part of it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reformer_dist.fs.atomic import file_sha256, make_staging, publish, write_atomic, write_synced
from reformer_dist.fs.lock import acquire_lock, locked


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    write_atomic(path, b"new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "newer")
    assert path.read_text() == "new"


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    folder = tmp_path / "below" / "folder"
    (make_staging(folder) / "left by a crash").touch()
    for text in ("first", "second"):
        staging = make_staging(folder)
        write_synced(staging / "file", text)
        assert not (folder / text).exists()
        publish(staging, folder)
        assert [path.name for path in folder.iterdir()] == ["file"]
        assert (folder / "file").read_text() == text
        assert list(folder.parent.iterdir()) == [folder]


def test_sha256_of_a_file(tmp_path: Path) -> None:
    write_synced(tmp_path / "file", "abc")
    assert file_sha256(tmp_path / "file").startswith("ba7816bf8f01cfea")


def test_a_lock_excludes_threads_and_is_released(tmp_path: Path) -> None:
    inside: list[int] = []

    def enter(_: int) -> int:
        with locked(tmp_path / "lock"):
            inside.append(1)
            most = len(inside)
            inside.pop()
            return most

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(enter, range(200))) == {1}
    with locked(tmp_path / "lock"):
        assert acquire_lock(tmp_path / "lock") is None
    descriptor = acquire_lock(tmp_path / "lock")
    assert descriptor is not None and acquire_lock(tmp_path / "lock") is None
    os.close(descriptor)
