"""A local cache of remote files with a size limit, shared by all processes that use the same folder.

Copies are keyed by the sha256 that they should have, so datasets share copies of common shards. A copy is written
to a temporary file and renamed, so a killed process leaves no partial copy. Space is reserved before a download,
under a lock, by removing the least recently used copies; a removed file stays readable while it is open.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from reformer_dist.errors import DataError
from reformer_dist.fs.atomic import file_sha256
from reformer_dist.fs.lock import locked

STALE_SECONDS = 3600.0  # seconds without progress after which a download counts as dead
MAX_DOWNLOADS = 3  # of a file whose content is wrong in a different way each time


@dataclass(frozen=True)
class FileRef:
    """A file of a dataset as recorded: name, size in bytes (None if unknown) and sha256."""

    name: str
    size: int | None
    sha256: str


class FileCache:
    """An LRU cache of remote files."""

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        self._folder, self._limit = Path(folder).expanduser(), limit_bytes
        self._agreed: set[Path] = set()  # copies with another sha256, in which two downloads agreed

    def open(self, file: FileRef, where: str, download: Callable[[Path], None]) -> int:
        """Returns a descriptor of the cached copy of a file. `download` writes it to a path if there is none yet.

        If two downloads agree on a content with another sha256, the source is damaged and this process uses that
        copy; the next process downloads again, since the source may have been repaired. Raises DataError if the
        file is larger than the cache or the cache can't be written.
        """
        if file.size is not None and file.size > self._limit:
            raise DataError(f"{where}: holds {file.size} bytes; data.cache_gb must leave room for it")
        try:
            while True:
                descriptor = self._open_copy(file)
                if descriptor is not None:
                    return descriptor
                # another process may evict it again before it is opened here
                with self._lock(file.sha256):
                    if not any(self._copies(file)):
                        self._fetch(file, where, download)
        except OSError as error:
            expected = "data.cache_dir must be a folder that can be written to, with room for data.cache_gb"
            problem = f"the cache can't be used ({error.strerror or error})"
            raise DataError(f"{self._folder}: {problem}; {expected}") from error

    def _copies(self, file: FileRef) -> Iterator[Path]:
        for path in self._folder.glob(f"{file.sha256}*.copy"):
            if path.name == f"{file.sha256}.copy" or path in self._agreed:
                yield path

    def _open_copy(self, file: FileRef) -> int | None:
        for path in self._copies(file):
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY)
                with suppress(OSError):
                    os.utime(path)
                return descriptor
        return None

    def _fetch(self, file: FileRef, where: str, download: Callable[[Path], None]) -> None:
        seen: set[str] = set()
        for _ in range(MAX_DOWNLOADS):
            partial = self._reserve(file)
            try:
                download(partial)
                sha256 = file_sha256(partial)
                if sha256 == file.sha256:
                    partial.rename(self._folder / f"{file.sha256}.copy")
                    return
                if sha256 in seen:
                    self._agreed.add(partial.rename(self._folder / f"{file.sha256}-{sha256[:16]}.copy"))
                    return
                seen.add(sha256)
            finally:
                partial.unlink(missing_ok=True)
        raise DataError(f"{where}: {MAX_DOWNLOADS} downloads had different contents; check the connection")

    def _reserve(self, file: FileRef) -> Path:
        """Frees space and returns the file to write to, whose name holds the size reserved."""
        size = file.size or 0
        with self._lock("room"):
            copies, used = [], size
            for path in self._folder.glob("*.copy"):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    copies.append((status.st_mtime_ns, path.name, status.st_size))
                    used += status.st_size
            for path in self._folder.glob("*.partial"):
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > STALE_SECONDS:
                        path.unlink()
                    else:
                        used += int(path.name.split("-")[0])
            for _, name, copy_size in sorted(copies):
                if used <= self._limit:
                    break
                (self._folder / name).unlink(missing_ok=True)
                used -= copy_size
            partial = self._folder / f"{size}-{uuid.uuid4().hex}.partial"
            partial.touch()
            return partial

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Excludes other threads and processes. Released when the process dies."""
        folder = self._folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / name):
            yield
