"""Tar files of other programs as datasets, indexed where they are."""

from __future__ import annotations

import gzip
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from support.datasets import documents_of, read_world, varied_documents, write_tar
from support.launch import run_ranks
from support.tiny import tiny_overrides

from reformer_dist.data import (
    BpeTokenizer,
    ByteTokenizer,
    Dataset,
    TextMember,
    Tokenizer,
    index_tar_files,
    verify_dataset,
    write_dataset,
)
from reformer_dist.data.prepare import in_place
from reformer_dist.errors import DataError

BPE = BpeTokenizer.train([text for _, text in varied_documents()], 280)
TEXT = TextMember.of("txt", "text")


def write_webdataset(folder: Path, dataset: Dataset) -> dict[str, list[Path]]:
    """The documents of a dataset, shard by shard, as another program writes them: JSON beside other members."""
    paths: dict[str, list[Path]] = {split: [] for split in dataset.splits}
    folder.mkdir()
    names = iter(range(1000))
    for split, shards in dataset.splits.items():
        texts = iter([dataset.tokenizer.decode(ids) for ids in documents_of(dataset, split)])
        for number, shard in enumerate(shards):
            paths[split].append(folder / f"{split}-{number:06d}.tar")
            with webdataset.TarWriter(str(paths[split][-1])) as writer:
                for _ in range(shard.samples):
                    key = f"deep/er/{next(names):08d}" + "x" * (90 * (number % 2))
                    writer.write({"__key__": key, "cls": 1, "meta.json": {"body": next(texts)}})
    return paths


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_the_same_documents_are_read_in_the_same_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Through links, since the files are in another folder, and in their own; batches equal those of shards."""
    write_dataset(varied_documents(), tmp_path / "shards", tokenizer, 12_000, 0.2)
    shards = Dataset.open(tmp_path / "shards")
    paths = write_webdataset(tmp_path / "tars", shards)
    member = TextMember.of(".meta.json", "body")
    for folder in (tmp_path / "links", tmp_path / "tars"):
        summary = index_tar_files(paths["train"], folder, tokenizer, member, heldout=paths["heldout"])
        dataset = Dataset.open(folder)
        assert not list(verify_dataset(dataset))
        assert summary.total("samples") == 60 and dataset.fingerprint != shards.fingerprint
        for split in shards.splits:
            assert [s.samples for s in dataset.shards(split)] == [s.samples for s in shards.shards(split)]
            for found, expected in zip(documents_of(dataset, split), documents_of(shards, split), strict=True):
                assert found.tolist() == expected.tolist() and found.dtype == expected.dtype
        for shuffle in (False, True):
            found, expected = (read_world(each, 12, 2, shuffle=shuffle)[0] for each in (dataset, shards))
            assert torch.equal(found, expected)
    assert all((tmp_path / "links" / path.name).is_symlink() for path in paths["train"])
    assert not any(path.is_symlink() for path in (tmp_path / "tars").iterdir())
    with pytest.raises(DataError, match="--overwrite"):
        index_tar_files(paths["train"], tmp_path / "tars", tokenizer, member, heldout=paths["heldout"])
    with pytest.raises(DataError, match="index of tar files"):
        write_dataset(varied_documents(), tmp_path / "tars", tokenizer, overwrite=True)
    index_tar_files(paths["train"], tmp_path / "tars", tokenizer, member, heldout_fraction=0.3, overwrite=True)
    assert all(path.is_file() for path in paths["train"])


def test_a_run_has_the_same_losses(tmp_path: Path) -> None:
    """By the commands."""
    write_dataset(varied_documents(), tmp_path / "shards", BPE, 12_000, 0.2)
    paths = write_webdataset(tmp_path / "tars", Dataset.open(tmp_path / "shards"))
    given = [*paths["train"], "--in-place", "--member", "meta.json", "--text-field", "body"]
    vocabulary = ["--tokenizer", "bpe", "--tokenizer-file", tmp_path / "shards/tokenizer.json"]
    more = ["--output", tmp_path / "d", "--heldout-from", *paths["heldout"]]
    run_ranks("reformer_dist.shards", 1, [*given, *vocabulary, *more], forked=True)
    losses = []
    for data in ("shards", "d"):
        changed = ("trainer.max_steps=3", "trainer.eval_every=3")
        keys = tiny_overrides(tmp_path / data, tmp_path / f"run-{data}", *changed)
        shown = run_ranks("reformer_dist.train", 1, keys, forked=True)
        losses.append(re.findall(r"loss ([\d.]+)", shown))
    assert losses[0] == losses[1] and len(losses[0]) >= 4


def write_texts(path: Path, texts: list[bytes], suffix: str = "txt") -> Path:
    write_tar(path, [(f"{number:04d}.{suffix}", text) for number, text in enumerate(texts)])
    return path


def test_samples_are_held_out_by_content(tmp_path: Path) -> None:
    """One tar file has samples of both splits; empty ones are left out."""
    texts = [b"text %d" % number for number in range(100)]
    paths = [write_texts(tmp_path / f"{n}.tar", [*texts[n * 50 : n * 50 + 50], b""]) for n in range(2)]
    summary = index_tar_files(paths, tmp_path / "d", ByteTokenizer(), TEXT, heldout_fraction=0.2)
    dataset = Dataset.open(tmp_path / "d")
    found = {split: [bytes(ids[:-1].tolist()) for ids in documents_of(dataset, split)] for split in dataset.splits}
    assert sorted(found["train"] + found["heldout"]) == sorted(texts) and 5 < len(found["heldout"]) < 40
    assert found["train"] == [text for text in texts if text in found["train"]]
    assert (summary.empty, len(dataset.shards("train"))) == (2, 2)
    content = bytearray(paths[0].read_bytes())
    entry = dataset.index(dataset.shards("train")[0]).entries[0]
    content[entry.offset] ^= 1
    paths[0].write_bytes(content)
    assert any("is altered" in message for message in verify_dataset(dataset))


@pytest.mark.parametrize(
    ("members", "member", "message"),
    [
        (
            {"a.jpg": b"x", "a.cls": b"1"},
            TEXT,
            r"d\.tar: sample 'a': has no member \.txt; .*\.jpg, \.cls.*--member",
        ),
        ({"a.txt": b"x", "b.cls": b"1"}, TEXT, r"d\.tar: sample 'b': has no member \.txt.*--skip-unreadable"),
        ({}, TEXT, r"d\.tar: has no member \.txt; the file holds nothing"),
        ({"a.json": b"{"}, TextMember.of("json", "text"), r"d\.tar: a\.json: is not valid JSON"),
        ({"a.json": b'{"body": "x"}'}, TextMember.of("json", "text"), r"d\.tar: a\.json: .*'text'; it holds body"),
        ({"a.json": b'["x"]'}, TextMember.of("json", "text"), r"d\.tar: a\.json: has no text"),
    ],
)
def test_tar_files_of_another_layout_are_named(
    tmp_path: Path, members: dict[str, bytes], member: TextMember, message: str
) -> None:
    write_tar(tmp_path / "d.tar", list(members.items()))
    with pytest.raises(DataError, match=message):
        index_tar_files([tmp_path / "d.tar"], tmp_path / "d", ByteTokenizer(), member)
    assert not (tmp_path / "d" / "dataset.json").exists()


def test_bad_tar_files_are_named(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "d.tar", [b"x" * 5000, b"y"])
    (tmp_path / "z.tar").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "torn.tar").write_bytes(path.read_bytes()[:3000])
    for name in ("z.tar", "torn.tar"):
        with pytest.raises(DataError, match=rf"{name}: is not a whole tar file"):
            index_tar_files([tmp_path / name], tmp_path / "d", ByteTokenizer(), TEXT)
    (tmp_path / "sub").mkdir()
    twin = write_texts(tmp_path / "sub/d.tar", [b"x"])
    with pytest.raises(DataError, match=r"d\.tar: another tar file has this name"):
        index_tar_files([path, twin], tmp_path / "d", ByteTokenizer(), TEXT)
    with pytest.raises(DataError, match=r"--heldout 1e-09: the split heldout would be empty"):
        index_tar_files([path], tmp_path / "d", ByteTokenizer(), TEXT, heldout_fraction=1e-9)
    others = tmp_path / "others.tar"
    write_tar(others, [("a.txt", b"text"), ("b.cls", b"1"), ("c.txt", b"more")])
    summary = index_tar_files(
        [others], tmp_path / "e", ByteTokenizer(), TEXT, heldout_fraction=0, skip_others=True
    )
    assert (summary.total("samples"), summary.empty) == (2, 1)


def test_finished_indexes_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write_texts(tmp_path / f"{n}.tar", [b"text %d %d" % (n, m) for m in range(40)]) for n in range(4)]
    read: list[str] = []
    read_entries = in_place._read_entries

    def interrupted(job: Any, tokenizer: Tokenizer) -> Any:
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(job.path.name)
        return read_entries(job, tokenizer)

    monkeypatch.setattr(in_place, "_read_entries", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index_tar_files(paths, tmp_path / "d", ByteTokenizer(), TEXT, heldout_fraction=0.2)
    os.utime(paths[1])  # written again since
    monkeypatch.setattr(
        in_place, "_read_entries", lambda job, t: read.append(job.path.name) or read_entries(job, t)
    )
    index_tar_files(paths, tmp_path / "d", ByteTokenizer(), TEXT, heldout_fraction=0.2)
    assert read == ["0.tar", "1.tar", "1.tar", "2.tar", "3.tar"]
    index_tar_files(paths, tmp_path / "e", ByteTokenizer(), TEXT, heldout_fraction=0.2)
    assert (tmp_path / "d/dataset.json").read_bytes() == (tmp_path / "e/dataset.json").read_bytes()
    assert not (tmp_path / "d/.writing").exists()
    record = json.loads((tmp_path / "d/dataset.json").read_text())
    assert record["text_member"] == {"suffix": "txt", "field": None}
    with tarfile.open(tmp_path / "d/0.tar") as tar:
        assert len(tar.getnames()) == 40


@pytest.mark.jobs
def test_processes_write_the_same_indexes(tmp_path: Path) -> None:
    paths = [write_texts(tmp_path / f"{n}.tar", [b"text %d %d" % (n, m) for m in range(40)]) for n in range(3)]
    for folder, workers in (("one", 0), ("two", 2)):
        index_tar_files(paths, tmp_path / folder, BPE, TEXT, heldout_fraction=0.2, workers=workers)
    found = [
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir() if not path.is_symlink()}
        for folder in ("one", "two")
    ]
    assert found[0] == found[1] and len(found[0]) == 8
