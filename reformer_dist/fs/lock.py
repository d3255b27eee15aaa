"""One job at a time in a run directory.

Rank 0 holds a lock on a file there for its whole job. The kernel releases it when the process ends, however it
ends, so a lock is never stale; network file systems keep it across machines, though the lock of a machine that was
lost may outlive it until a lease ends. What stands in the file only serves the message.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from reformer_dist.errors import ConfigError
from reformer_dist.process.log import logger

LOCK_FILE = ".lock"
LEASE = 120.0  # seconds that the lock of a lost machine may live on; NFS gives it 90 by default
POLL = 0.5  # seconds
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class RunLock:
    """Held from birth until it is closed, or the process ends."""

    def __init__(self, folder: Path, lease: float = LEASE) -> None:
        """Raises ConfigError, which names host and process, where another job has it.

        A lock of this machine is refused at once; that of another is waited for, `lease` seconds long.
        """
        self._path = folder / LOCK_FILE
        # not "w": what another job wrote must stay
        self._file = self._path.open("a+", encoding="utf-8")
        try:
            self._take(lease)
        except ConfigError:
            self._file.close()
            raise
        self._write(json.dumps(_self()))

    def close(self) -> None:
        self._write("")
        self._file.close()

    def _take(self, lease: float) -> None:
        deadline, said = time.monotonic() + lease, ""
        while not self._try():
            holder = self._holder()
            words = (
                f"output_dir={self._path.parent}: in use by process {holder.get('pid')} on {holder.get('host')}"
            )
            is_here = holder.get("machine") == _self()["machine"]
            if is_here or time.monotonic() > deadline:
                raise ConfigError(f"{words}; wait until that job ends, or choose another output_dir")
            if holder and words != said:
                logger.info(f"{words}; waiting {lease:g} s for it, in case it was lost")
                said = words
            time.sleep(POLL)

    def _try(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            reason = error.strerror or error
            logger.warning(f"{self._path}: this file system keeps no locks ({reason}); start one job only here")
        return True

    def _holder(self) -> dict[str, Any]:
        """Who has the lock; nothing where that job has not yet said so."""
        with suppress(ValueError):
            self._file.seek(0)
            return dict(json.loads(self._file.read()))
        return {}

    def _write(self, text: str) -> None:
        self._file.truncate(0)
        self._file.write(text)
        self._file.flush()


def _self() -> dict[str, Any]:
    host = socket.gethostname()
    # a name may stand for several machines one after another, as those of Kubernetes pods do
    machine = BOOT_ID.read_text().strip() if BOOT_ID.is_file() else host
    return {"host": host, "pid": os.getpid(), "machine": machine}
