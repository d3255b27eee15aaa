"""Output whose reader exits early, such as `| head` and `| tee`: no traceback, and the status of the run."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_overrides

from reformer_dist.process.exit_status import BROKEN_PIPE, PREEMPTED
from reformer_dist.process.log import configure, logger
from reformer_dist.process.stdio import is_disconnected

pytestmark = pytest.mark.jobs

BIN = Path(sys.executable).parent
INSPECT = Path(__file__).parents[2] / "tools/inspect_shards.py"
TWO_RANKS = ("launcher=local", "launcher.nproc_per_node=2")


def begin(*command: object, is_buffered: bool = True, **options: Any) -> subprocess.Popen[str]:
    words = [str(word) for word in command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "" if is_buffered else "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, **options)


def steps_done(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.is_file() else 0


@pytest.mark.parametrize(
    ("ranks", "are_joined"),
    [pytest.param((), False, marks=pytest.mark.slow), ((), True), (TWO_RANKS, True)],
    ids=["stdout", "both", "two ranks, both"],
)
def test_a_run_without_a_reader_trains_on_and_saves(tiny_data, tmp_path, ranks, are_joined):
    run, complaints = tmp_path / "run", tmp_path / "complaints"
    endless = ("trainer.max_steps=1000000", "trainer.save_every=1000000", "optim.schedule=constant")
    overrides = tiny_overrides(tiny_data, run, *endless, *ranks)
    with complaints.open("w") as file:
        errors = subprocess.STDOUT if are_joined else file
        process = begin(BIN / "reformer-train", *overrides, stderr=errors)
        try:
            assert any("| loss" in line for line in process.stdout)
            process.stdout.close()
            wanted, deadline = steps_done(run) + 10, time.monotonic() + 60
            while steps_done(run) < wanted:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == PREEMPTED
        finally:
            process.kill()
            process.wait()
    assert complaints.read_text() == ""
    [saved] = (run / "checkpoints").iterdir()
    assert int(saved.name[5:]) >= wanted


def unread(*command: object, is_buffered: bool = True) -> tuple[int, str]:
    """Exit status and stderr of a command whose stdout is closed from the start."""
    with begin(*command, stderr=subprocess.PIPE, is_buffered=is_buffered) as process:
        process.stdout.close()
        complaints = process.stderr.read()
        return process.wait(120), complaints


def test_a_command_that_was_done_all_the_same_says_nothing(tiny_data, tmp_path):
    for name in ("reformer-train", "reformer-generate"):
        assert unread(BIN / name, "--help") == (0, "")
    assert unread(sys.executable, INSPECT, tiny_data) == (0, "")


def test_a_command_that_nobody_reads_is_not_done_to_its_end(trained, tiny_data):
    assert unread(BIN / "reformer-train", "--help", is_buffered=False) == (BROKEN_PIPE, "")
    assert unread(sys.executable, INSPECT, tiny_data, is_buffered=False) == (BROKEN_PIPE, "")
    assert unread(BIN / "reformer-generate", trained, "--max-new-tokens", 20) == (BROKEN_PIPE, "")


def test_errors_are_told_where_they_are_read(tmp_path):
    status, complaints = unread(BIN / "reformer-generate", tmp_path)
    assert status == 1 and complaints.startswith("error: ") and len(complaints.splitlines()) == 1


def test_a_stream_without_another_end_is_not_unread(tmp_path, monkeypatch, capsys):
    """A notebook's stream, or one closed in this process: logging reports it, and the program continues."""
    with (tmp_path / "file").open("w") as file:
        assert not is_disconnected(file) and not is_disconnected(io.StringIO())
    assert not is_disconnected(file)
    before = (list(logger.handlers), logger.propagate)
    monkeypatch.setattr(sys, "stdout", stream := io.StringIO())
    configure()
    stream.close()
    try:
        logger.warning("words")
    finally:
        logger.handlers[:], logger.propagate = before
    assert "I/O operation on closed file" in capsys.readouterr().err
