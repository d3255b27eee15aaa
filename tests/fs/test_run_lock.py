"""Two jobs never share a run directory; what a job that is gone has left there stops none."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.launch import run_command
from support.tiny import tiny_overrides, write_tiny_dataset

from reformer_dist.errors import ConfigError
from reformer_dist.fs import lock as run_lock
from reformer_dist.fs.lock import LOCK_FILE, RunLock

pytestmark = pytest.mark.jobs

HOLD = """
import sys, time
from pathlib import Path
from reformer_dist.fs import lock as run_lock
run_lock.BOOT_ID = Path(sys.argv[2])
lock = run_lock.RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(float(sys.argv[3]))
lock.close()
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Any]:
    """Starts a process that holds the lock of tmp_path."""
    processes: list[subprocess.Popen[str]] = []

    def start(seconds: float = 60, boot_id: Path = run_lock.BOOT_ID) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path), str(boot_id), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """The boot id of another machine."""
    path = tmp_path / "boot_id"
    path.write_text("another machine")
    return path


def test_a_second_job_is_refused_at_once_with_host_and_process(hold, tmp_path):
    holder = hold()
    for _ in range(2):  # the first refusal leaves everything as it was
        with pytest.raises(ConfigError, match=f"process {holder.pid} on {socket.gethostname()}"):
            RunLock(tmp_path)
    assert str(holder.pid) in (tmp_path / LOCK_FILE).read_text()


def test_a_killed_job_leaves_no_lock(hold, tmp_path):
    holder = hold()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert str(holder.pid) in (tmp_path / LOCK_FILE).read_text()
    RunLock(tmp_path).close()


def test_a_job_that_ended_leaves_an_empty_file(hold, tmp_path):
    assert hold(seconds=0).wait() == 0
    assert (tmp_path / LOCK_FILE).read_text() == ""


def test_another_machine_is_waited_for(hold, tmp_path, elsewhere):
    """It may be one that was lost, whose lock the file system gives up only later."""
    hold(seconds=1, boot_id=elsewhere)
    RunLock(tmp_path, lease=30).close()


def test_another_machine_that_goes_on_is_refused(hold, tmp_path, elsewhere):
    holder = hold(boot_id=elsewhere)
    with pytest.raises(ConfigError, match=rf"process {holder.pid}\b"):
        RunLock(tmp_path, lease=0.1)


def test_a_file_system_without_locks_stops_nobody(tmp_path, monkeypatch, caplog):
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(run_lock.logger, "propagate", True)
    RunLock(tmp_path).close()
    assert str(tmp_path) in caplog.text and "locks" in caplog.text


def test_training_is_refused_before_anything_is_written(hold, tmp_path):
    holder = hold()
    overrides = tiny_overrides(write_tiny_dataset(tmp_path / "data"), tmp_path)
    said = run_command("reformer-train", *overrides, status=1)
    assert re.match(rf"error: output_dir={tmp_path}: .*process {holder.pid}\b", said), said
    assert {path.name for path in tmp_path.iterdir()} == {"data", LOCK_FILE}
