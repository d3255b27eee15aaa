"""File locks. The kernel releases them when their process ends, however it ends, so that no lock is ever stale."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from reformer_dist.errors import ConfigError
from reformer_dist.process.log import logger

LOCK_FILE = ".lock"
LEASE = 120.0  # seconds for which the lock of a lost machine may persist; 90 by default with NFS
POLL = 0.5  # seconds
FLOCK = "hhqqi4x"  # struct flock of Linux
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def acquire_lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a file; None if another process holds it.

    The lock is released when the last process with an inherited copy of the descriptor closes it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file within the block, after waiting for it. Excludes threads, too."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class RunLock:
    """Admits one job at a time to a run directory: rank 0 holds the lock of a file there until it is closed.

    A POSIX lock, which network file systems keep across machines. The lock of a lost machine may outlive it until
    a lease ends. The content of the file is only used in messages.
    """

    def __init__(self, folder: Path, lease: float = LEASE) -> None:
        """Raises ConfigError, which names host and process, if another job holds the lock.

        Raises at once if the lock is held on this machine; waits `lease` seconds if it is held on another.
        """
        self._path = folder / LOCK_FILE
        # not "w", which would erase what the holder wrote
        self._file = self._path.open("a+", encoding="utf-8")
        try:
            self._acquire(lease)
        except ConfigError:
            self._file.close()
            raise
        self._write(json.dumps(_own_record()))

    def close(self) -> None:
        self._write("")
        self._file.close()

    def _acquire(self, lease: float) -> None:
        deadline, logged = time.monotonic() + lease, ""
        while not self._try():
            holder = self._holder()
            process = f"process {holder.get('pid')} on {holder.get('host')}"
            message = f"output_dir={self._path.parent}: in use by {process}"
            is_local = holder.get("machine") == _own_record()["machine"]
            if is_local or time.monotonic() > deadline:
                raise ConfigError(f"{message}; wait until that job ends, or choose another output_dir")
            if holder and message != logged:
                logger.info(f"{message}; waiting up to {lease:g} s, in case that machine was lost")
                logged = message
            time.sleep(POLL)

    def _try(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            reason = error.strerror or error
            logger.warning(f"{self._path}: no locks on this file system ({reason}); start only one job here")
        return True

    def _holder(self) -> dict[str, Any]:
        """Record of the process that holds the lock; empty if it has not been written yet."""
        with suppress(ValueError):
            self._file.seek(0)
            return dict(json.loads(self._file.read()))
        return {}

    def _write(self, text: str) -> None:
        self._file.truncate(0)
        self._file.write(text)
        self._file.flush()


def is_locked(folder: Path) -> bool:
    """Whether a job holds the RunLock of a run directory. On systems other than Linux, whether one has left it."""
    path = folder / LOCK_FILE
    try:
        with path.open("rb") as file:
            if sys.platform != "linux":
                return bool(file.read(1))
            asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            # the lock is not taken, which could refuse a job that starts at this moment
            kind, *_ = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
            return bool(kind != fcntl.F_UNLCK)
    except OSError:
        return False


def _own_record() -> dict[str, Any]:
    host = socket.gethostname()
    # a host name may be reused by another machine, as those of Kubernetes pods are
    machine = BOOT_ID.read_text().strip() if BOOT_ID.is_file() else host
    return {"host": host, "pid": os.getpid(), "machine": machine}
