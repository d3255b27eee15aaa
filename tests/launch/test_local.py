"""launcher=local: what the ranks are told, and how their end becomes the command's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from support.events import scalars
from support.launch import run_command
from support.launch import run_ranks as run_under_torchrun
from support.tiny import tiny_overrides, write_tiny_dataset

from reformer_dist.config import LauncherConfig
from reformer_dist.launch.local import run_ranks, threads_per_rank
from reformer_dist.process.cores import usable_cores
from reformer_dist.process.exit_status import KILLED, PREEMPTED

pytestmark = pytest.mark.jobs

KILLED_BY_SIGKILL = KILLED + signal.SIGKILL
PATHS = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
START = """
import sys
from reformer_dist.config import LauncherConfig
from reformer_dist.launch.local import run_ranks
run_ranks("obedient_rank", sys.argv[1:], LauncherConfig(nproc_per_node=2), "")
"""


@pytest.fixture
def obey(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Runs two ranks with a fate each, from this process; returns the status."""

    def run(*fates: str, max_restarts: int = 0) -> int:
        launcher = LauncherConfig(nproc_per_node=len(fates), max_restarts=max_restarts)
        return run_ranks("obedient_rank", [str(tmp_path), *fates], launcher, "begin again")

    with patch.dict(os.environ, PYTHONPATH=PATHS):  # what a launcher tells its ranks is forgotten afterwards
        os.environ.pop("OMP_NUM_THREADS", None)
        yield run


def wait_for_files(folder: Path, pattern: str) -> None:
    """Until both ranks have written theirs."""
    deadline = time.monotonic() + 60
    while len(list(folder.glob(pattern))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)


def test_ranks_know_who_they_are(obey, tmp_path):
    assert obey("end=0", "end=0") == 0
    told = [json.loads((tmp_path / f"rank{rank}.0.json").read_text()) for rank in range(2)]
    assert [rank["RANK"] for rank in told] == [rank["LOCAL_RANK"] for rank in told] == ["0", "1"]
    assert {(rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"], rank["MASTER_ADDR"]) for rank in told} == {
        ("2", "2", "127.0.0.1")
    }
    assert {rank["OMP_NUM_THREADS"] for rank in told} == {str(threads_per_rank(2))}


def test_threads_are_a_share_of_the_cores():
    cores = usable_cores()
    assert threads_per_rank(1) == cores
    assert threads_per_rank(10 * cores) == 1


def test_threads_that_the_user_chose_stay(obey, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert obey("end=0") == 0
    assert json.loads((tmp_path / "rank0.0.json").read_text())["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("status", [1, PREEMPTED, 130])
def test_the_status_of_a_rank_is_that_of_the_job(obey, status, capfd):
    """The other rank, which waits, is ended; and nobody says a word that the ranks have not said."""
    assert obey("wait=9", f"end={status}", max_restarts=1) == status
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_signals_reach_all_ranks_and_their_status_comes_back(obey, tmp_path, name, request):
    # a shell has its background jobs ignore SIGINT, nohup has them ignore SIGHUP; and so the launcher would
    found = signal.signal(signal.Signals[name], signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(signal.Signals[name], found))

    def send() -> None:
        wait_for_files(tmp_path, "rank*.json")
        os.kill(os.getpid(), signal.Signals[name])

    before = signal.getsignal(signal.Signals[name])
    thread = threading.Thread(target=send)
    thread.start()
    assert obey(f"wait={PREEMPTED}", f"wait={PREEMPTED}", max_restarts=1) == PREEMPTED
    thread.join()
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == ["SIGTERM", "SIGTERM"]
    assert signal.getsignal(signal.Signals[name]) is before


def test_ranks_that_can_not_hear_yet_may_be_queued_again(obey, tmp_path, capfd):
    """For a moment, while Python starts, a signal kills."""

    def send() -> None:
        wait_for_files(tmp_path, "rank*.json")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    assert obey("deaf", "deaf", max_restarts=1) == PREEMPTED
    thread.join()
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent has ended")
def test_ranks_of_a_killed_launcher_are_told_to_stop(tmp_path):
    command = [sys.executable, "-c", START, str(tmp_path), "wait=0", "wait=0"]
    launcher = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": PATHS})
    wait_for_files(tmp_path, "rank*.json")
    launcher.kill()
    launcher.wait()
    wait_for_files(tmp_path, "saved*")
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == ["SIGTERM", "SIGTERM"]


def test_a_killed_rank_is_named(obey, capfd):
    assert obey("wait=1", "die") == KILLED_BY_SIGKILL
    assert capfd.readouterr() == ("", "error: rank 1 of 2 was killed by SIGKILL; begin again\n")


def test_a_killed_rank_starts_again_with_all_others(obey, tmp_path, capfd):
    assert obey("end=0", "die-once", max_restarts=1) == 0
    assert (tmp_path / "rank1.1.json").is_file() and (tmp_path / "rank0.1.json").is_file()
    assert "rank 1 of 2 was killed by SIGKILL; restarting all ranks" in capfd.readouterr().err


def test_restarts_come_to_an_end(obey, tmp_path):
    assert obey("die", max_restarts=1) == KILLED_BY_SIGKILL
    assert len(list(tmp_path.glob("rank0.*.json"))) == 2


def test_training_is_that_of_torchrun(tmp_path):
    data = write_tiny_dataset(tmp_path / "data")
    changed = ("deepspeed=zero2", "trainer.max_steps=3")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    launcher = ("launcher=local", "launcher.nproc_per_node=2")
    said = run_command("reformer-train", *tiny_overrides(data, ours, *changed, *launcher))
    assert "2 ranks on cpu" in said
    # under torchrun, the same words make no ranks within ranks
    run_under_torchrun("reformer_dist.train", 2, tiny_overrides(data, theirs, *changed, *launcher))
    assert scalars(ours, "train/loss") == scalars(theirs, "train/loss")


def test_bad_input_is_one_message(tmp_path):
    overrides = tiny_overrides(
        tmp_path / "nothing", tmp_path / "run", "launcher=local", "launcher.nproc_per_node=2"
    )
    said = run_command("reformer-train", *overrides, status=1)
    assert said.startswith("error: ") and len(said.splitlines()) == 1, said
