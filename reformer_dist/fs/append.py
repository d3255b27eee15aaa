"""Appending to a file on a disk that may be full."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from reformer_dist.process.log import logger


class AppendFile:
    """Appends whole records. Records that can't be written are kept in memory and written before the next."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file can't be created."""
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._pending = b""
        self._is_full = False

    def write(self, record: bytes) -> None:
        """Logs a warning, once, while records can't be written."""
        self._pending += record
        try:
            self._write_pending()
        except OSError as error:
            if not self._is_full:
                logger.warning(f"{self._path}: can't be written ({error.strerror}); kept in memory until it can")
            self._is_full = True

    def sync(self) -> None:
        """Writes all records and syncs them to disk. Raises OSError if that fails."""
        self._write_pending()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Tries to write pending records once more."""
        with suppress(OSError):
            self._write_pending()
        if self._pending:
            logger.warning(f"{self._path}: {len(self._pending)} bytes could not be written and are lost")
        self._file.close()

    def _write_pending(self) -> None:
        end = os.fstat(self._file.fileno()).st_size
        try:
            unwritten = self._pending
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]
        except OSError as error:
            self._file.truncate(end)  # readers must only see whole records
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._pending, self._is_full = b"", False
