"""Altered datasets are refused with an error that names the wrong value."""

from __future__ import annotations

import hashlib
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.datasets import damage_sample, documents_of, edit_index, edit_record, folder_of, write_tar

from reformer_dist.data import BpeTokenizer, Corpus, Dataset, SampleReader, SampleRef, Shard, verify_dataset
from reformer_dist.data.format.sample_reader import DamagedSampleError
from reformer_dist.errors import DataError


@pytest.fixture
def copy(dataset: Dataset, tmp_path: Path) -> Path:
    """Folder of a dataset that tests may modify."""
    shutil.copytree(folder_of(dataset), tmp_path / "copy")
    return tmp_path / "copy"


def read_first_sample(folder: Path) -> Any:
    dataset = Dataset.open(folder)
    shard = dataset.shards("train")[0]
    with closing(SampleReader()) as reader:
        return reader.read(SampleRef(dataset, shard, dataset.index(shard).entries[0]))


def test_a_missing_data_set_is_reported_with_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"reformer-shards"):
        Dataset.open(tmp_path / "nothing")


def test_a_missing_relative_path_is_reported_with_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = rf"^nothing: .*working directory, {tmp_path}\b"
    with pytest.raises(DataError, match=words):
        Dataset.open("nothing")
    with pytest.raises(DataError) as absolute:
        Dataset.open(tmp_path / "nothing")
    assert "working directory" not in str(absolute.value)


def test_broken_json(copy: Path) -> None:
    path = copy / "dataset.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(DataError, match=r"dataset\.json: .*JSON"):
        Dataset.open(copy)
    path.write_text("[]")
    with pytest.raises(DataError, match=r"dataset\.json: .*JSON object"):
        Dataset.open(copy)


def _set_shard(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        record["splits"]["train"][1][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(format=1), "format 1 .*reformer-shards"),
        (lambda record: record.pop("format"), "format None "),
        (lambda record: record.pop("splits"), "splits train, heldout"),
        (lambda record: record["splits"].update(train=3), "list"),
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
        (_set_shard("index_sha256", "xy"), "index_sha256 is 'xy'"),
    ],
)
def test_bad_records(copy: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit_record(copy, change)
    with pytest.raises(DataError, match=message):
        Dataset.open(copy)


def test_an_edited_record_is_refused(copy: Path) -> None:
    path = copy / "dataset.json"
    path.write_text(path.read_text().replace('"text_bytes": ', '"text_bytes": 1', 1))
    with pytest.raises(DataError, match=r"dataset\.json: "):
        Dataset.open(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda samples: samples.pop(), "samples"),
        (lambda samples: samples[0].update(offset=0), "begins at 0"),
        (lambda samples: samples[0].update(offset=513), "begins at 513"),
        (lambda samples: samples[1].update(offset=512), "begins at 512"),
        (lambda samples: samples[-1].update(offset=1 << 40), f"{(1 << 40) // 1000}.*10240"),
        (lambda samples: samples[0].update(size=1 << 40, n_tokens=(1 << 40) + 1), f"{1 << 40}"),
        (lambda samples: samples[0].update(n_tokens=3), "3 tokens"),
        (lambda samples: samples[0].update(n_bytes=3), "bytes of text"),
        (lambda samples: samples[0].update(key="../x"), "refused"),
        (lambda samples: samples[1].update(key=samples[0]["key"]), "twice"),
        (lambda samples: samples[0].update(sha256="0"), "sha256.*'0'"),
        (lambda samples: samples[0].update(document=None), "document .*None"),
        (lambda samples: samples.append(3), "document .*None"),
    ],
)
def test_bad_indexes(copy: Path, change: Callable[[list[dict[str, Any]]], None], message: str) -> None:
    edit_index(copy, "train-000000.json", change)
    with pytest.raises(DataError, match=rf"train-000000\.json.*{message}"):
        read_first_sample(copy)


def test_an_edited_index_is_refused(copy: Path) -> None:
    path = copy / "train-000000.json"
    path.write_text(path.read_text().replace('"offset": 512', '"offset": 1024'))
    with pytest.raises(DataError, match=r"train-000000\.json: .*index"):
        read_first_sample(copy)
    path.unlink()
    with pytest.raises(DataError, match=r"train-000000\.json: is missing"):
        read_first_sample(copy)


def test_check_names_missing_and_torn_shards(copy: Path) -> None:
    corpus = Corpus.open([copy])
    assert not list(corpus.check("train", 0.0))
    path = copy / "train-000001.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=rf"train-000001\.tar: .*\b1000 bytes.*\b{size}\b"):
        list(corpus.check("train", 0.0))
    [warning] = corpus.check("train", 0.9)
    assert "train-000001.tar" in warning
    path.unlink()
    with pytest.raises(DataError, match=rf"train-000001\.tar: .*missing.*\b{size}\b"):
        list(corpus.check("train", 0.9))


@pytest.mark.parametrize("cut", [0, 100, 512, 513])
def test_torn_samples_are_damaged(copy: Path, cut: int) -> None:
    path = copy / "train-000000.tar"
    assert len(read_first_sample(copy)) > 1
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamagedSampleError, match="is torn"):
        read_first_sample(copy)


def test_a_shard_that_is_not_a_tar_file(copy: Path) -> None:
    path = copy / "train-000000.tar"
    path.write_bytes(b"not a tar file" * 1000)
    with pytest.raises(DamagedSampleError, match="tar header is broken"):
        read_first_sample(copy)
    path.unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar: is missing"):
        read_first_sample(copy)
    path.mkdir()
    with pytest.raises(DataError, match=r"train-000000\.tar: is missing"):
        read_first_sample(copy)


@pytest.mark.parametrize("name", ["00000000.pkl", "x.pickle", "/00.txt", "../00.txt", "a/../00.txt", "a\\00.txt"])
def test_bad_members_are_refused(copy: Path, name: str) -> None:
    write_tar(copy / "train-000000.tar", [(name, pickle.dumps("x")), ("more.txt", bytes(20_000))])
    with pytest.raises(DataError, match=r"train-000000\.tar: sample \d+ .*named"):
        read_first_sample(copy)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
)
def test_links_and_devices_are_refused(copy: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("00000000.txt")
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(copy / "train-000000.tar", "w") as tar:
        tar.addfile(member)
    with pytest.raises(DataError, match=r"train-000000\.tar: sample \d+ .*link, device or "):
        read_first_sample(copy)


def test_oversized_members_are_refused(copy: Path) -> None:
    member = tarfile.TarInfo("00000000.txt")
    member.size = 1 << 40
    path = copy / "train-000000.tar"
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + path.read_bytes()[512:])
    with pytest.raises(DataError, match=rf"\b{1 << 40} bytes"):
        read_first_sample(copy)


def test_another_member_at_the_offset_is_damage(copy: Path) -> None:
    write_tar(copy / "train-000000.tar", [("other.txt", bytes(5000))])
    with pytest.raises(DamagedSampleError, match=r"'other\.txt' of 5000 bytes"):
        read_first_sample(copy)


def test_bad_token_ids(make_dataset: Callable[..., Dataset]) -> None:
    """They were written like that, so they do not count as damage."""
    folder = folder_of(make_dataset(tokenizer=BpeTokenizer.train([b"text"], 270)))
    path = folder / "train-000000.tar"
    content = b"\xff\xff" * (Dataset.open(folder).index(shard_of(folder)).entries[0].size // 2)
    write_tar(path, [("00000000.u16", content), ("more", bytes(20_000))])
    digest = hashlib.sha256(content).hexdigest()
    edit_index(folder, "train-000000.json", lambda samples: samples[0].update(sha256=digest))
    with pytest.raises(DataError, match=r"sample 00000000 .*token 65535"):
        read_first_sample(folder)


def shard_of(folder: Path) -> Shard:
    return Dataset.open(folder).shards("train")[0]


@pytest.mark.parametrize(
    "address",
    [
        "pipe:cat x",
        "PIPE:cat x",
        "simplecache::http://x/y",
        "http::file:///x",
        "ftp://x/y",
        "memory://x",
        "s3:::x",
    ],
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(DataError, match=rf"data\.path={re.escape(address)}: "):
        Dataset.open(address)


def test_file_addresses(copy: Path) -> None:
    there = copy.rename(copy.with_name("with space"))
    dataset = Dataset.open(f"file://{str(there).replace(' ', '%20')}")
    assert len(documents_of(dataset)) == dataset.total("samples", "train")


def test_damage_is_found_and_named(copy: Path) -> None:
    assert list(verify_dataset(Dataset.open(copy))) == []
    dataset = Dataset.open(copy)
    _, name, key = damage_sample(dataset, 30)
    (copy / "train-000000.tar").unlink()
    (copy / "heldout-000000.json").unlink()
    damage = list(verify_dataset(Dataset.open(copy)))
    assert len(damage) == 4
    assert "train-000000.tar: is missing" in damage[0]
    assert f"{name}: shard" in damage[1]
    assert f"{name}: sample {key}" in damage[2] and "altered" in damage[2]
    assert "heldout-000000.json" in damage[3]


def test_data_sets_of_different_tokenizers_do_not_mix(
    dataset: Dataset, make_dataset: Callable[..., Dataset]
) -> None:
    other = make_dataset(tokenizer=BpeTokenizer.train([b"text"], 270))
    with pytest.raises(DataError, match=rf"tokenizer of {folder_of(other)}"):
        Corpus([dataset, other])
