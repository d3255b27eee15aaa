"""A rank of a real run that shares sequences is killed: the others end with a message that names it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tiny import tiny_overrides, write_tiny_dataset

pytestmark = [pytest.mark.slow, pytest.mark.jobs]
BOUND = 60  # seconds, of a busy machine


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    data = write_tiny_dataset(tmp_path / "data")
    changed = ("parallel.sequence=2", "parallel.buckets=2", "trainer.max_steps=100000", "deepspeed=zero2")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # by hand: a launcher would end the other rank itself
    ranks = [start(rank, port, tiny_overrides(data, tmp_path / "run", *changed), tmp_path) for rank in range(4)]
    try:
        wait_for(" 3/100000 ", tmp_path / "rank0.log")
        ranks[2].send_signal(signal.SIGKILL)
        for rank in (0, 1, 3):
            assert ranks[rank].wait(BOUND) == 1
            said = (tmp_path / f"rank{rank}.log").read_text()
            assert "rank 2 of 4 was lost" in said, said
    finally:
        for process in ranks:
            process.kill()


def start(rank: int, port: int, overrides: list[str], folder: Path) -> subprocess.Popen[bytes]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "reformer_dist.train", *overrides]
    with (folder / f"rank{rank}.log").open("wb") as log:
        return subprocess.Popen(command, env=os.environ | place | address, stdout=log, stderr=subprocess.STDOUT)


def wait_for(words: str, path: Path) -> None:
    deadline = time.monotonic() + 2 * BOUND
    while words not in path.read_text():
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.2)
