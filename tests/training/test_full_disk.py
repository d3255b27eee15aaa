"""A full disk fails saves, not the run; once there is space again, nothing is lost."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_helpers import LOSS, checkpoint, losses, train, when_told
from support.events import scalars
from support.weights import assert_same

from reformer_dist.checkpoint import async_save
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import UserError

STATE = 495_372  # bytes of weights and moments of the tiny model
FAILED = "a checkpoint could not be written: "


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, free: int) -> None:
    """Leaves `free` bytes, or up to one page less."""
    size = shutil.disk_usage(disk).free - free
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def empty(disk: Path) -> None:
    (disk / "filler").unlink()


def assert_nothing_is_lost(run: Path, whole: Path) -> None:
    """Step 3 was not saved; all else is as on an empty disk."""
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    assert_same(checkpoint(run, 6), checkpoint(whole, 6))
    assert scalars(run, LOSS) == scalars(whole, LOSS)
    found = losses(run)
    assert [found[step][LOSS] for step in range(1, 7)] == [losses(whole)[step][LOSS] for step in range(1, 7)]
    assert [found[step]["checkpoint/failed_saves"] for step in (1, 2, 3, 6)] == [0, 0, 0, 1]


@pytest.mark.parametrize("free", [0, STATE - 4096])
def test_a_disk_without_room(
    whole: Path, tiny_data: Path, disk: Path, job: Runtime, said: pytest.LogCaptureFixture, free: int
) -> None:
    """Free space is checked before anything is written."""
    with when_told(step_2=lambda: fill(disk, free), could_not_be_written=lambda: empty(disk)):
        run = train(job, tiny_data, disk / "run")
    [told] = [line for line in said.messages if line.startswith(FAILED)]
    assert re.search(rf"\b{STATE:,} bytes, and [\d,]+ are free", told)
    assert_nothing_is_lost(run, whole)


def test_a_disk_that_fills_while_a_checkpoint_is_written(
    whole: Path,
    tiny_data: Path,
    disk: Path,
    job: Runtime,
    said: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = async_save.save_file

    def save_on_a_full_disk(*args: object) -> None:
        monkeypatch.setattr(async_save, "save_file", save)
        fill(disk, STATE // 2)
        save(*args)

    monkeypatch.setattr(async_save, "save_file", save_on_a_full_disk)
    with when_told(could_not_be_written=lambda: empty(disk)):
        run = train(job, tiny_data, disk / "run")
    [told] = [line for line in said.messages if line.startswith(FAILED)]
    assert "rank-00000.safetensors" in told and "No space left on device" in told
    assert_nothing_is_lost(run, whole)


@pytest.mark.parametrize(
    ("largest", "name"), [(STATE // 2, "rank-00000.safetensors"), (1000, "events.out.tfevents")]
)
def test_files_that_can_not_grow(
    whole: Path,
    tiny_data: Path,
    tmp_path: Path,
    job: Runtime,
    said: pytest.LogCaptureFixture,
    largest: int,
    name: str,
) -> None:
    """As with a quota: a write stops in the middle of a file. No checkpoint is ahead of metrics kept in memory."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with when_told(
            step_1=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1])),
            could_not_be_written=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before),
        ):
            run = train(job, tiny_data, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    [told] = [line for line in said.messages if line.startswith(FAILED)]
    assert name in told and "File too large" in told
    waits = [line for line in said.messages if line.endswith("kept in memory until it can")]
    assert bool(waits) == (largest < STATE // 2)
    assert len(waits) == len({line.split(": ")[0] for line in waits})  # once per file
    assert_nothing_is_lost(run, whole)


def test_the_last_checkpoint_must_find_room(
    whole: Path, tiny_data: Path, disk: Path, job: Runtime, said: pytest.LogCaptureFixture
) -> None:
    """The run ends with one message; the same command resumes once there is space."""
    message = rf"\b{STATE:,} bytes.*\b0 are free.*; the 3 steps since \S+/step-00000003 are lost"
    with when_told(step_5=lambda: fill(disk, 0)), pytest.raises(UserError, match=message):
        train(job, tiny_data, disk / "run")
    assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    empty(disk)
    run = train(job, tiny_data, disk / "run")
    assert_same(checkpoint(run, 6), checkpoint(whole, 6))
    assert scalars(run, LOSS) == scalars(whole, LOSS)
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
