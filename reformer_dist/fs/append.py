"""A file that grows by whole records, and waits for a disk that is full."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from reformer_dist.process.log import logger


class PatientFile:
    """Appends records. What the disk does not take is kept, and written before whatever comes next."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file can't be made."""
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._pending = b""
        self._is_full = False

    def write(self, record: bytes) -> None:
        """Says so, once, where it can't be written yet."""
        self._pending += record
        try:
            self._write_pending()
        except OSError as error:
            if not self._is_full:
                logger.warning(f"{self._path}: can't be written ({error.strerror}); kept in memory until it can")
            self._is_full = True

    def sync(self) -> None:
        """Returns when all records are on the disk. Raises OSError where they can't be."""
        self._write_pending()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Tries once more."""
        with suppress(OSError):
            self._write_pending()
        if self._pending:
            logger.warning(f"{self._path}: {len(self._pending)} bytes could not be written and are lost")
        self._file.close()

    def _write_pending(self) -> None:
        end = os.fstat(self._file.fileno()).st_size
        try:
            rest = self._pending
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(end)  # readers see whole records
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._pending, self._is_full = b"", False
