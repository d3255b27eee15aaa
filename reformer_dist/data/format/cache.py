"""A folder of this machine that holds copies of remote files, up to a size; shared by all processes that name it.

A copy is known by the sha256 that it should have, so data sets that share shards share copies. It is written aside
and renamed, so a process that is killed leaves no half. Room is reserved before a download, under a lock, by
removing what was used longest ago; a file that somebody has open stays normalize until it is closed.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from reformer_dist.data.format.layout import file_sha256
from reformer_dist.errors import DataError

STALE_SECONDS = 3600.0  # seconds without a byte after which a download is taken for dead
MAX_DOWNLOADS = 3  # of a file whose content is wrong each time in another way


@dataclass(frozen=True)
class FileRef:
    """A file of a data set, as its records describe it."""

    name: str
    size: int | None
    sha256: str


class FileCache:
    """Copies of remote files, the least recently used of which make room for new ones."""

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        self._folder, self._limit = Path(folder).expanduser(), limit_bytes
        self._agreed: set[Path] = set()  # copies of another content than wanted, as the source gave it twice

    def open(self, wanted: FileRef, where: str, download: Callable[[Path], None]) -> int:
        """A descriptor of the copy of a file, which `download` writes to a path if there is none yet.

        Where two downloads agree on a content that is not the wanted one, the source holds that, and so does the
        copy, for this process: the next one asks again, since the source may have been mended. Raises DataError
        where the file is larger than the cache, or the cache can't be written.
        """
        if wanted.size is not None and wanted.size > self._limit:
            right = f"holds {wanted.size} bytes; data.cache_gb must leave room for it"
            raise DataError(f"{where}: {right}")
        try:
            while True:
                descriptor = self._open_copy(wanted)
                if descriptor is not None:
                    return descriptor
                # it may be removed again before we open it, by a process that needs the room more
                with self._lock(wanted.sha256):
                    if not any(self._copies(wanted)):
                        self._fetch(wanted, where, download)
        except OSError as error:
            right = "data.cache_dir must be a folder that can be written to, with room for data.cache_gb"
            words = f"the cache can't be used ({error.strerror or error})"
            raise DataError(f"{self._folder}: {words}; {right}") from error

    def _copies(self, wanted: FileRef) -> Iterator[Path]:
        for path in self._folder.glob(f"{wanted.sha256}*.copy"):
            if path.name == f"{wanted.sha256}.copy" or path in self._agreed:
                yield path

    def _open_copy(self, wanted: FileRef) -> int | None:
        for path in self._copies(wanted):
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY)
                with suppress(OSError):
                    os.utime(path)
                return descriptor
        return None

    def _fetch(self, wanted: FileRef, where: str, download: Callable[[Path], None]) -> None:
        seen: set[str] = set()
        for _ in range(MAX_DOWNLOADS):
            partial = self._reserve(wanted)
            try:
                download(partial)
                found = file_sha256(partial)
                if found == wanted.sha256:
                    partial.rename(self._folder / f"{wanted.sha256}.copy")
                    return
                if found in seen:
                    self._agreed.add(partial.rename(self._folder / f"{wanted.sha256}-{found[:16]}.copy"))
                    return
                seen.add(found)
            finally:
                partial.unlink(missing_ok=True)
        raise DataError(f"{where}: each of {MAX_DOWNLOADS} downloads gave something else; see to the connection")

    def _reserve(self, wanted: FileRef) -> Path:
        """Makes room; returns the file to write to, whose name tells others how much is taken."""
        size = wanted.size or 0
        with self._lock("room"):
            copies, taken = [], size
            for path in self._folder.glob("*.copy"):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    copies.append((status.st_mtime_ns, path.name, status.st_size))
                    taken += status.st_size
            for path in self._folder.glob("*.partial"):
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > STALE_SECONDS:
                        path.unlink()
                    else:
                        taken += int(path.name.split("-")[0])
            for _, name, freed in sorted(copies):
                if taken <= self._limit:
                    break
                (self._folder / name).unlink(missing_ok=True)
                taken -= freed
            partial = self._folder / f"{size}-{uuid.uuid4().hex}.partial"
            partial.touch()
            return partial

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Holds off other threads and processes; a process that dies lets go."""
        folder = self._folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
