"""Damaged and partly written checkpoints are never used, and the damage is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_helpers import fragment, split_evenly, write, written
from safetensors import SafetensorError

from reformer_dist.checkpoint import (
    CheckpointReader,
    async_save,
    checkpoint_problem,
    find_checkpoint,
    resolve_checkpoint,
)
from reformer_dist.distributed.runtime import SharedError
from reformer_dist.errors import CheckpointError

WEIGHTS = "rank-00001.safetensors"


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit_manifest(folder: Path, **changed: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "missing json": (lambda folder: (folder / "rank-00000.json").unlink(), r"rank-00000\.json is missing"),
    "truncated": (truncate, rf"{WEIGHTS} has \d+ bytes instead of \d+"),
    "flipped byte": (flip, f"content of {WEIGHTS} has changed"),
    "edited run": (lambda folder: (folder / "run.json").write_text("{}"), r"run\.json has 2 bytes"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json is missing"),
    "torn manifest": (lambda folder: (folder / "manifest.json").write_text('{"files"'), "can't be read"),
    "empty manifest": (lambda folder: (folder / "manifest.json").write_text("{}"), "can't be read"),
    "other json": (lambda folder: (folder / "manifest.json").write_text("[]"), "can't be read"),
    "no text": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\x00"), "can't be read"),
    "odd files": (lambda folder: edit_manifest(folder, files=[1]), "can't be read"),
    "future format": (lambda folder: edit_manifest(folder, format=2), "its format is 2, this version reads 1"),
    "no folder": (lambda folder: (shutil.rmtree(folder), folder.write_text("")), "can't be read"),
}
damages = pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=list(DAMAGE))


@damages
def test_the_newest_good_one_is_found(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    for step in (10, 9, 100):
        written(tmp_path, step)
    newest = tmp_path / "step-00000100"
    assert find_checkpoint(tmp_path) == (newest, [])
    damage(newest)
    wrong = checkpoint_problem(newest)
    assert wrong is not None
    assert re.search(words, wrong)
    found, complaints = find_checkpoint(tmp_path)
    assert found == tmp_path / "step-00000010"
    assert complaints == [f"{newest}: {wrong}"]


def test_there_may_be_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "nowhere") == (None, [])
    truncate(written(tmp_path))
    found, complaints = find_checkpoint(tmp_path)
    assert found is None
    assert len(complaints) == 1


def test_half_written_ones_are_not_taken(tmp_path: Path) -> None:
    shutil.move(written(tmp_path, 5), tmp_path / ".step-00000005.partial")
    assert find_checkpoint(tmp_path) == (None, [])
    written(tmp_path, 5)  # leftovers are no obstacle
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_paths_that_users_give(tmp_path: Path) -> None:
    old, new = (written(tmp_path / "checkpoints", step) for step in (1, 2))
    assert resolve_checkpoint(tmp_path) == new
    assert resolve_checkpoint(tmp_path / "checkpoints") == new
    assert resolve_checkpoint(old) == old
    flip(new)
    assert resolve_checkpoint(tmp_path) == old
    with pytest.raises(CheckpointError, match=f"{new}.*: .*{WEIGHTS}"):
        resolve_checkpoint(new)
    flip(old)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: .*\n.*{new.name}: .*\n.*{old.name}: "):
        resolve_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere: .*checkpoint"):
        resolve_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("place", ["save_file", "manifest_entry", "write_synced", "publish"])
def test_a_crash_leaves_the_old_one_and_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    old = written(tmp_path, 1)

    def crash(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(async_save, place, crash)
    for error in write(tmp_path, 2):
        assert isinstance(error, SharedError)
        assert "No space left on device" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert find_checkpoint(tmp_path) == (old, [])


def test_a_kill_before_the_rename_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files are written, but not renamed; nothing cleans up, as after a kill."""
    old = written(tmp_path, 1)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 2, fragments=split_evenly(1))
    assert (tmp_path / ".step-00000002.partial" / "manifest.json").is_file()
    assert find_checkpoint(tmp_path) == (old, [])
    assert written(tmp_path, 2) == find_checkpoint(tmp_path)[0]


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_one_rank_that_fails_fails_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_rank: int) -> None:
    """The safetensors error of a full disk must not leave the other ranks waiting."""
    save = async_save.save_file

    def fail(tensors: dict[str, object], path: Path) -> None:
        if f"rank-0000{bad_rank}" in path.name:
            raise SafetensorError("I/O error: No space left on device")
        save(tensors, path)

    monkeypatch.setattr(async_save, "save_file", fail)
    errors = write(tmp_path, 1)
    assert len({str(error) for error in errors}) == 1
    assert all(isinstance(error, SharedError) for error in errors)
    assert f"rank {bad_rank}: " in str(errors[0])
    assert "No space left" in str(errors[0])
    assert not list(tmp_path.iterdir())


def test_a_good_checkpoint_is_replaced_by_a_newer_of_the_same_step(tmp_path: Path) -> None:
    written(tmp_path, 3)
    again = written(tmp_path, 3, fragments=[[fragment("bias", 0, 5, adam_step=2)]])
    assert checkpoint_problem(again) is None
    assert CheckpointReader(again).adam_step == 2


def names(root: Path) -> list[str]:
    return sorted(path.name.removeprefix("step-").lstrip("0") for path in root.iterdir())


@pytest.mark.parametrize(
    ("keep", "left"), [(0, ["1", "2", "3", "4"]), (1, ["4"]), (2, ["3", "4"]), (9, ["1", "2", "3", "4"])]
)
def test_old_ones_are_pruned(tmp_path: Path, keep: int, left: list[str]) -> None:
    for step in (1, 2, 3, 4):
        written(tmp_path, step, keep=keep)
    assert names(tmp_path) == left


def test_every_so_many_steps_one_stays(tmp_path: Path) -> None:
    for step in range(1, 8):
        written(tmp_path, step, keep=2, keep_every=3)
    assert names(tmp_path) == ["3", "6", "7"]


def test_later_ones_never_push_out_the_one_just_written(tmp_path: Path) -> None:
    """A run that resumes before a damaged checkpoint must keep its new, intact one."""
    for step in (1, 2, 5):
        written(tmp_path, step)
    truncate(tmp_path / "step-00000005")
    written(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["3", "5"]
    assert find_checkpoint(tmp_path)[0] == tmp_path / "step-00000003"
