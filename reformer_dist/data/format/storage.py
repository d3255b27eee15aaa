"""Folders of datasets: local, or remote (http:, https: and s3:) through fsspec.

A file of a remote folder is copied whole into the cache when it is first opened. Addresses are checked before use,
so that none runs a command or chains file systems.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import fsspec
from fsspec.callbacks import Callback

from reformer_dist.data.format.cache import FileCache, FileRef
from reformer_dist.errors import DataError, SourceUnavailable

REMOTE_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs"}
RETRY_DELAYS = (0.5, 1.0, 2.0)  # seconds before the first retries of a failed request
LONG_DELAY = 20.0  # seconds before each further one, of a folder with patience
TRANSIENT_STATUSES = {408, 429}  # of HTTP; other statuses from 400 to 499 are final
MAX_INDEX_BYTES = 1 << 30
logger = logging.getLogger("reformer_dist.data")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")

T = TypeVar("T")


class Folder(Protocol):
    """The folder of one dataset."""

    @property
    def address(self) -> str:
        """Address as the user wrote it."""

    def where(self, name: str) -> str:
        """Path or URL of a file, for error messages."""

    def read(self, name: str) -> bytes:
        """Content of a small file. Raises DataError if it is missing or can't be read."""

    def open(self, file: FileRef) -> int:
        """A descriptor of a local file, for os.pread. Raises DataError if there is none.

        Local files are not verified. The copy of a remote file differs from the recorded sha256 only if the source
        does.
        """


def open_folder(address: str, cache: FileCache) -> Folder:
    """The folder at an address, without reading it. Raises DataError if the address is refused."""
    match = _SCHEME.match(address)
    if match is None:
        return LocalFolder(address, Path(address))
    scheme = match[1].lower()
    if scheme == "file":
        return LocalFolder(address, Path(unquote(urlsplit(address).path)))
    if scheme not in REMOTE_PACKAGES or "::" in address:
        expected = "a folder, or begin with file:, http:, https: or s3:"
        raise DataError(f"data.path={address}: this kind of address is refused; it must be {expected}")
    return RemoteFolder(address, _file_system(scheme, address), cache)


class LocalFolder:
    """A folder of this machine or mounted on it."""

    def __init__(self, address: str, path: Path) -> None:
        self.address, self.path = address, path

    def where(self, name: str) -> str:
        return str(self.path / name)

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise DataError(f"{self.where(name)}: can't be read ({error.strerror})") from error

    def open(self, file: FileRef) -> int:
        path = self.path / file.name
        try:
            if not path.is_file():  # reading a device or pipe might never end
                raise DataError(f"{path}: is missing; it must hold {file.size} bytes")
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            problem = f"can't be opened ({error.strerror}); it must hold {file.size} bytes"
            raise DataError(f"{path}: {problem}") from error


class RemoteFolder:
    """A folder on a file system of fsspec. Files are cached on first use."""

    def __init__(self, address: str, file_system: Any, cache: FileCache) -> None:
        self.address = address
        self._file_system, self._cache = file_system, cache
        self.patience = 0.0
        """Seconds for which requests are retried, beyond RETRY_DELAYS, while the source does not respond."""
        # http takes the whole address, s3 the bucket and the path
        self._root = file_system._strip_protocol(address).rstrip("/")

    def where(self, name: str) -> str:
        return f"{self.address.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        return self._retry(name, lambda source: self._file_system.cat_file(source), time.monotonic())

    def open(self, file: FileRef) -> int:
        # the wait for another process that downloads the file counts too
        where, start = self.where(file.name), time.monotonic()

        def download(path: Path) -> None:
            def copy(source: str) -> None:
                self._file_system.get_file(source, str(path), callback=_SizeLimit(file, where))

            self._retry(file.name, copy, start)

        return self._cache.open(file, where, download)

    def _retry(self, name: str, action: Callable[[str], T], start: float) -> T:
        """Raises DataError, and SourceUnavailable if the source may respond later."""
        where = self.where(name)
        for n_failed in count():
            try:
                return action(f"{self._root}/{name}")
            except DataError:
                raise
            except FileNotFoundError as error:
                raise DataError(f"{where}: is missing") from error
            except Exception as error:  # each file system raises its own types
                if n_failed >= len(RETRY_DELAYS):
                    problem = f"{where}: can't be read ({type(error).__name__}: {error})"
                    if _is_final(error):
                        raise DataError(problem) from error
                    remaining = self.patience - (time.monotonic() - start)
                    if remaining < LONG_DELAY:
                        raise SourceUnavailable(problem) from error
                    if n_failed == len(RETRY_DELAYS):
                        logger.error(f"{problem}; trying again for {remaining:.0f} s")
            time.sleep(RETRY_DELAYS[n_failed] if n_failed < len(RETRY_DELAYS) else LONG_DELAY)
        raise AssertionError  # not reached


def _is_final(error: Exception) -> bool:
    """Whether the request would fail again, as one without permission."""
    status = getattr(error, "status", None)
    is_refused = isinstance(status, int) and 400 <= status < 500 and status not in TRANSIENT_STATUSES
    return is_refused or isinstance(error, PermissionError)


class _SizeLimit(Callback):
    """Aborts a download that exceeds the recorded size, so that a source can't fill the disk."""

    def __init__(self, file: FileRef, where: str) -> None:
        super().__init__()
        self._max_bytes, self._where = MAX_INDEX_BYTES if file.size is None else file.size, where

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self._max_bytes:
            raise DataError(f"{self._where}: holds more than the {self._max_bytes} bytes that it must hold")


def _file_system(scheme: str, address: str) -> Any:
    package = REMOTE_PACKAGES[scheme]
    try:
        importlib.import_module(package)
    except ImportError as error:
        hint = "pip install 'reformer_dist[remote]'"
        raise DataError(f"data.path={address}: {scheme}: needs the package {package}: {hint}") from error
    # proxies come from the environment; a cached listing would hide a repaired file
    options = {} if scheme == "s3" else {"client_kwargs": {"trust_env": True}}
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)
