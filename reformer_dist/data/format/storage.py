"""Folders that hold data sets: on this machine, or behind http(s): and s3: through fsspec.

A file of a remote folder is copied whole into the cache when it is first opened. An address is looked at before
anything is done with it: none runs a command, and none chains file systems.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import fsspec
from fsspec.callbacks import Callback

from reformer_dist.data.format.cache import FileCache, FileRef
from reformer_dist.errors import DataError

REMOTE_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs"}
RETRY_DELAYS = (0.5, 1.0, 2.0)  # seconds before a failed request is made again
MAX_INDEX_BYTES = 1 << 30
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


T = TypeVar("T")


class Folder(Protocol):
    """Where the files of one data set are."""

    @property
    def address(self) -> str:
        """As the user gave it."""
        ...

    def where(self, name: str) -> str:
        """How errors call a file."""
        ...

    def read(self, name: str) -> bytes:
        """A small file whole. Raises DataError where there is none or it can't be read."""
        ...

    def open(self, wanted: FileRef) -> int:
        """A descriptor of a file on this machine, for os.pread. Raises DataError where there is none.

        The content of a local file is whatever it is; that of a remote one may differ from the wanted sha256
        only if it does so at the source.
        """
        ...


def open_folder(address: str, cache: FileCache) -> Folder:
    """The folder that an address names; nothing is read. Raises DataError for an address that is refused."""
    found = _SCHEME.match(address)
    if found is None:
        return LocalFolder(address, Path(address))
    scheme = found[1].lower()
    if scheme == "file":
        return LocalFolder(address, Path(unquote(urlsplit(address).path)))
    if scheme not in REMOTE_PACKAGES or "::" in address:
        right = "a folder, or begin with file:, http:, https: or s3:"
        raise DataError(f"data.path={address}: this kind of address is refused; it must be {right}")
    return RemoteFolder(address, _file_system(scheme, address), cache)


class LocalFolder:
    """A folder of this machine, or one that is mounted on it."""

    def __init__(self, address: str, path: Path) -> None:
        self.address, self.path = address, path

    def where(self, name: str) -> str:
        return str(self.path / name)

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise DataError(f"{self.where(name)}: can't be read ({error.strerror})") from error

    def size(self, name: str) -> int | None:
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def open(self, wanted: FileRef) -> int:
        path = self.path / wanted.name
        try:
            if not path.is_file():  # a device or pipe in its place would never end
                raise DataError(f"{path}: is missing; it must hold {wanted.size} bytes")
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(
                f"{path}: can't be opened ({error.strerror}); it must hold {wanted.size} bytes"
            ) from error


class RemoteFolder:
    """A folder behind a file system of fsspec, with its files in the cache once they were needed."""

    def __init__(self, address: str, file_system: Any, cache: FileCache) -> None:
        self.address = address
        self._file_system, self._cache = file_system, cache
        # http wants the whole address, s3 the bucket and what follows
        self._root = file_system._strip_protocol(address).rstrip("/")

    def where(self, name: str) -> str:
        return f"{self.address.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        return self._retried(name, lambda source: self._file_system.cat_file(source))

    def open(self, wanted: FileRef) -> int:
        where = self.where(wanted.name)

        def download(path: Path) -> None:
            def copy(source: str) -> None:
                self._file_system.get_file(source, str(path), callback=_Limit(wanted, where))

            self._retried(wanted.name, copy)

        return self._cache.open(wanted, where, download)

    def _retried(self, name: str, action: Callable[[str], T], attempt: int = 0) -> T:
        try:
            return action(f"{self._root}/{name}")
        except DataError:
            raise
        except FileNotFoundError as error:
            raise DataError(f"{self.where(name)}: is missing") from error
        except Exception as error:  # each file system has its own kinds
            if attempt == len(RETRY_DELAYS):
                words = f"{type(error).__name__}: {error}"
                raise DataError(f"{self.where(name)}: can't be read ({words})") from error
        time.sleep(RETRY_DELAYS[attempt])
        return self._retried(name, action, attempt + 1)


class _Limit(Callback):
    """Ends a download that brings more than was recorded: the disk is not the source's to fill."""

    def __init__(self, wanted: FileRef, where: str) -> None:
        super().__init__()
        self._most, self._where = MAX_INDEX_BYTES if wanted.size is None else wanted.size, where

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self._most:
            raise DataError(f"{self._where}: holds more than the {self._most} bytes that it must hold")


def _file_system(scheme: str, address: str) -> Any:
    package = REMOTE_PACKAGES[scheme]
    try:
        importlib.import_module(package)
    except ImportError as error:
        fix = "pip install 'reformer_dist[remote]'"
        raise DataError(f"data.path={address}: {scheme}: needs the package {package}: {fix}") from error
    # proxies are the environment's business; a cached listing would hide a file that was repaired
    options = {} if scheme == "s3" else {"client_kwargs": {"trust_env": True}}
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)
