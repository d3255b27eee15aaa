"""Damaged data sets are refused, with the name of what is wrong."""

from __future__ import annotations

import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import write_tar

from reformer_dist.data import BpeTokenizer, Dataset, find_damage
from reformer_dist.data.documents import read_documents
from reformer_dist.errors import DataError


@pytest.fixture
def copy(dataset: Dataset, tmp_path: Path) -> Path:
    """Folder of a data set that may be changed."""
    shutil.copytree(dataset.folder, tmp_path / "copy")
    return tmp_path / "copy"


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "dataset.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def read_first_shard(folder: Path) -> list[Any]:
    dataset = Dataset.open(folder)
    return list(read_documents(dataset, dataset.shards("train")[0]))


def test_no_data_set_tells_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tools/make_shards\.py"):
        Dataset.open(tmp_path / "nothing")


def test_broken_json(copy: Path) -> None:
    path = copy / "dataset.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(DataError, match="not valid JSON"):
        Dataset.open(copy)
    path.write_text("[]")
    with pytest.raises(DataError, match="JSON object"):
        Dataset.open(copy)


def _set_shard(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        record["splits"]["train"][1][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(format=2), "format 2 is unknown"),
        (lambda record: record.pop("format"), "format None is unknown"),
        (lambda record: record.pop("splits"), "splits train, heldout"),
        (lambda record: record["splits"].update(train=3), "must be a list"),
        (lambda record: record.update(tokenizer={"kind": "words"}), "kind 'words'"),
        (lambda record: record.update(vocab_size=300), "vocab_size is 300"),
        (_set_shard("name", "/etc/passwd"), "refused"),
        (_set_shard("name", "../train-000001.tar"), "refused"),
        (_set_shard("name", ".."), "refused"),
        (_set_shard("name", "pipe:cat train-000001.tar"), "refused"),
        (_set_shard("name", "train-000000.tar"), "twice"),
        (_set_shard("size", "12"), "size is '12'"),
        (_set_shard("samples", -1), "samples is -1"),
        (_set_shard("samples", 0), "0 samples"),
        (_set_shard("sha256", None), "sha256 is None"),
    ],
)
def test_bad_records(copy: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit(copy, change)
    with pytest.raises(DataError, match=message):
        Dataset.open(copy)


def test_check_names_missing_and_torn_shards(copy: Path) -> None:
    Dataset.open(copy).check("train")
    path = copy / "train-000001.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=rf"train-000001\.tar: shard holds 1000 bytes, expected {size}"):
        Dataset.open(copy).check("train")
    path.unlink()
    with pytest.raises(DataError, match=rf"train-000001\.tar: shard is missing.*{size}"):
        Dataset.open(copy).check("train")


@pytest.mark.parametrize("cut", [0, 100, 512, 700, 1024, 2048, 4000])
def test_torn_shards_never_read_as_whole(copy: Path, cut: int) -> None:
    path = copy / "train-000000.tar"
    assert len(read_first_shard(copy)) > 1
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"train-000000\.tar.*torn"):
        read_first_shard(copy)


def test_a_shard_that_is_no_tar(copy: Path) -> None:
    (copy / "train-000000.tar").write_bytes(b"not a tar file" * 1000)
    with pytest.raises(DataError, match=r"train-000000\.tar: sample 0 can't be read"):
        read_first_shard(copy)
    (copy / "train-000000.tar").unlink()
    with pytest.raises(DataError, match="can't be opened"):
        read_first_shard(copy)


@pytest.mark.parametrize(
    "name", ["00.pkl", "00.pickle.txt", "00.u16", "00", "/00.txt", "../00.txt", "a/../00.txt", "a\\00.txt"]
)
def test_bad_members_are_refused(copy: Path, name: str) -> None:
    write_tar(copy / "train-000000.tar", [("0.txt", b"fine"), (name, pickle.dumps("x"))])
    with pytest.raises(DataError, match=r"train-000000\.tar: sample 1 is named"):
        read_first_shard(copy)


def test_links_are_not_followed(copy: Path) -> None:
    link = tarfile.TarInfo("0.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(copy / "train-000000.tar", "w") as tar:
        tar.addfile(link)
    with pytest.raises(DataError, match="holds 0 samples"):
        read_first_shard(copy)


@pytest.mark.parametrize(("payload", "message"), [(b"abc", "whole ids"), (b"\xff\xff", "token 65535")])
def test_bad_token_ids(make_dataset: Callable[..., Dataset], payload: bytes, message: str) -> None:
    folder = make_dataset(tokenizer=BpeTokenizer.train([b"text"], 270)).folder
    write_tar(folder / "train-000000.tar", [("0.u16", payload)])
    with pytest.raises(DataError, match=rf"sample 0 holds.*{message}"):
        read_first_shard(folder)


def test_damage_is_found_and_named(copy: Path) -> None:
    assert list(find_damage(Dataset.open(copy))) == []
    path = copy / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[512] ^= 1  # the first byte of the first sample
    path.write_bytes(content)
    (copy / "train-000000.tar").unlink()
    (copy / "heldout-000000.json").unlink()
    damage = list(find_damage(Dataset.open(copy)))
    assert len(damage) == 4
    assert "train-000000.tar: shard is missing" in damage[0]
    assert "train-000001.tar: shard is not" in damage[1]
    assert "train-000001.tar: sample" in damage[2]
    assert "heldout-000000.json" in damage[3]
