"""Samples encoded in batches: their order, processes that tokenize, and resuming after a kill."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from support.datasets import varied_documents

from reformer_dist.data import BpeTokenizer, ByteTokenizer, IdTokenizer, RawSample, write_samples
from reformer_dist.data.prepare import encode_parallel, staging
from reformer_dist.data.prepare import encoded_batches as batches_module
from reformer_dist.data.prepare.encode_parallel import encode_batches
from reformer_dist.data.prepare.encoded_batches import in_hash_order
from reformer_dist.errors import DataError


def documents(n_documents: int = 60) -> list[RawSample]:
    return [RawSample(name, (text,)) for name, text in varied_documents(n_documents)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_parallel, "BATCH_BYTES", 4096)


def test_the_order_depends_on_content_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one batch and one range, and in many of each, for any order of the input."""
    samples = [
        ("train", RawSample(f"doc{n}", (b"text %d" % (n % 100),), {"label": "é"}, split_key=b"key"))
        for n in range(600)
    ]

    def ordered(samples: list[tuple[str, RawSample]], name: str) -> list[object]:
        return list(in_hash_order(encode_batches(samples, ByteTokenizer(), tmp_path / name)))

    expected = ordered(samples, "one")
    assert sorted(sample.name for sample in expected) == sorted(sample.name for _, sample in samples)
    places = [int(sample.name[3:]) for sample in expected]
    assert sum(abs(a - b) == 1 for a, b in pairwise(places)) < 10
    shuffled = random.Random(0).sample(samples, len(samples))
    for n_bytes in (200_000, 20_000, 1_000):
        monkeypatch.setattr(batches_module, "RANGE_BYTES", n_bytes)
        monkeypatch.setattr(encode_parallel, "BATCH_BYTES", n_bytes)
        assert ordered(shuffled, f"many{n_bytes}") == expected
    names = "\n".join(sample.name for sample in expected).encode()
    # datasets must not change with the version
    assert hashlib.sha256(names).hexdigest()[:16] == "76759f679a2d6c6b"
    copies = [("train", RawSample("same", (b"a long text",)))] * 3
    assert len(ordered(copies, "copies")) == 3


@pytest.mark.usefixtures("small_batches")
@pytest.mark.jobs
def test_processes_change_nothing_but_the_time(tmp_path: Path) -> None:
    tokenizer = BpeTokenizer.train([text for _, text in varied_documents()], 280)
    read: list[int] = []
    one = write_samples(documents(), tmp_path / "one", tokenizer, 12_000, 0.2)
    two = write_samples(documents(), tmp_path / "two", tokenizer, 12_000, 0.2, workers=2, on_read=read.append)
    assert (one, files_of(tmp_path / "one")) == (two, files_of(tmp_path / "two"))
    assert len(read) > 4 and sum(read) == sum(len(text) for _, text in varied_documents())
    spoilt = [*documents(), RawSample("bad", (b"1 2 x",)), *documents()]
    with pytest.raises(DataError, match="token id"):
        write_samples(spoilt, tmp_path / "bad", IdTokenizer(9), workers=2)


@pytest.mark.usefixtures("small_batches")
def test_finished_batches_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those whose samples, splits and tokenizer are the same."""
    written: list[Path] = []

    def write_batch(path: Path, *arguments: object) -> object:
        written.append(path)
        return batches_module.write_batch(path, *arguments)

    monkeypatch.setattr(encode_parallel, "write_batch", write_batch)

    def interrupted(samples: list[RawSample]) -> Iterator[RawSample]:
        yield from samples[:40]
        raise KeyboardInterrupt

    def write(samples: object, folder: Path, *, fraction: float = 0.2, resume: bool = True) -> dict[str, bytes]:
        write_samples(samples, folder, ByteTokenizer(), 12_000, fraction, resume=resume)
        return files_of(folder)

    expected = write(documents(), tmp_path / "whole")
    n_all = len(written)
    written.clear()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            write(interrupted(documents()), tmp_path / "again")
    assert 2 < len(written) < n_all  # the second attempt wrote none
    assert staging.has_finished_work(tmp_path / "again")
    assert write(documents(), tmp_path / "again") == expected
    assert len(written) == n_all

    for changed in (documents(61)[1:], documents()):
        with pytest.raises(KeyboardInterrupt):
            write(interrupted(documents()), tmp_path / "other")
        fraction = 0.2 if len(changed) == 60 and changed[0].name == "doc1" else 0.3
        whole = write(changed, tmp_path / f"w{fraction}", fraction=fraction)
        assert write(changed, tmp_path / "other", fraction=fraction) == whole
        for path in (tmp_path / "other").iterdir():
            path.unlink()

    with pytest.raises(KeyboardInterrupt):
        write(interrupted(documents()), tmp_path / "new", resume=False)
    assert not list((tmp_path / "new").iterdir())


COMMAND = [sys.executable, "-m", "reformer_dist.shards"]


@pytest.mark.jobs
def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    """Killed twice, also its workers end; the result is that of a command that was not killed."""
    source = tmp_path / "d.txt"
    source.write_bytes(b"".join(b"line %d of a long text\n\n" % number for number in range(900_000)))
    arguments = [str(source), "--section-mb", "0.25", "--shard-mb", "4", "--workers", "2"]
    output = tmp_path / "data"
    killed = 0
    for n_batches in (1, 2):
        process = subprocess.Popen([*COMMAND, *arguments, "--output", str(output)], start_new_session=True)
        while len(list(output.glob(".writing/batches/*.json"))) < n_batches and process.poll() is None:
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        deadline = time.monotonic() + 30
        while _session_is_alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _session_is_alive(process.pid)
    assert killed
    for folder in (output, tmp_path / "whole"):
        done = subprocess.run([*COMMAND, *arguments, "--output", str(folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert files_of(output) == files_of(tmp_path / "whole")


def _session_is_alive(session: int) -> bool:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            values = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(values[3]) == session and values[0] != "Z":
            return True
    return False
