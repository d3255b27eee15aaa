"""Shards on disk."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from support.datasets import folder_of, varied_documents

from reformer_dist.data import (
    BpeTokenizer,
    ByteTokenizer,
    Dataset,
    SampleReader,
    SampleRef,
    is_heldout,
    verify_dataset,
    write_dataset,
)
from reformer_dist.errors import DataError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts_of(dataset: Dataset, split: str) -> list[bytes]:
    """Documents as plain webdataset reads them."""
    urls = [str(folder_of(dataset) / shard.name) for shard in dataset.shards(split)]
    return [sample["txt"] for sample in webdataset.WebDataset(urls, shardshuffle=False)]


def test_same_documents_give_the_same_bytes(make_dataset: Callable[..., Dataset]) -> None:
    first, second = make_dataset(), make_dataset()
    assert contents(folder_of(first)) == contents(folder_of(second))
    assert first.fingerprint == second.fingerprint
    assert make_dataset(varied_documents()[1:]).fingerprint != first.fingerprint
    with tarfile.open(folder_of(first) / "train-000000.tar") as tar:
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "")}


def test_plain_webdataset_reads_the_shards(dataset: Dataset) -> None:
    texts = {split: texts_of(dataset, split) for split in ("train", "heldout")}
    assert Counter(texts["train"] + texts["heldout"]) == Counter(text for _, text in varied_documents())
    assert len(dataset.shards("train")) > 3
    for split, found in texts.items():
        assert dataset.total("samples", split) == len(found)
        assert dataset.total("text_bytes", split) == sum(map(len, found))
        assert dataset.total("tokens", split) == sum(map(len, found)) + len(found)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_index_finds_every_sample(make_dataset: Callable[..., Dataset], kind: str) -> None:
    documents = dict(varied_documents())
    tokenizer = BpeTokenizer.train(documents.values(), 280) if kind == "bpe" else ByteTokenizer()
    dataset = make_dataset(tokenizer=tokenizer)
    names, reader = set(), SampleReader()
    for split in dataset.splits:
        for shard in dataset.shards(split):
            for entry in dataset.index(shard).entries:
                names.add(entry.document)
                ids = reader.read(SampleRef(dataset, shard, entry))[:-1]
                assert dataset.tokenizer.decode(ids) == documents[entry.document].decode()
                assert (entry.n_tokens, entry.n_bytes) == (len(ids) + 1, len(documents[entry.document]))
    reader.close()
    assert names == documents.keys()


def test_split_depends_on_content_alone(make_dataset: Callable[..., Dataset]) -> None:
    copies = [(f"copy of {name}", text) for name, text in varied_documents()]
    dataset = make_dataset(copies[::-1] + varied_documents())
    train, heldout = set(texts_of(dataset, "train")), set(texts_of(dataset, "heldout"))
    assert train and heldout and not train & heldout
    assert heldout == {text for _, text in varied_documents() if is_heldout(text, 0.2)}


def test_fraction_of_held_out_documents() -> None:
    texts = [b"%d" % number for number in range(4000)]
    for fraction in (0.0, 0.05, 0.5):
        share = sum(is_heldout(text, fraction) for text in texts) / len(texts)
        assert abs(share - fraction) < 0.03
    assert not any(is_heldout(text, 0.0) for text in texts)


def test_shards_keep_to_their_size(dataset: Dataset) -> None:
    for shard in dataset.shards("train"):
        if shard.samples > 1:
            assert sum(512 + -(-entry.size // 512) * 512 for entry in dataset.index(shard).entries) <= 12_000


def test_empty_and_unreadable_documents_are_counted(tmp_path: Path) -> None:
    documents = [("empty", b""), ("latin", b"caf\xe9"), *varied_documents()]
    tokenizer = BpeTokenizer.train([b"some text"], 270)
    summary = write_dataset(documents, tmp_path / "bpe", tokenizer, heldout_fraction=0.2)
    assert (summary.empty, summary.normalized, summary.total("samples")) == (1, 1, 61)
    summary = write_dataset(documents, tmp_path / "bytes", ByteTokenizer(), heldout_fraction=0.2)
    assert (summary.empty, summary.normalized) == (1, 0)
    dataset = Dataset.open(tmp_path / "bytes")
    assert b"caf\xe9" in texts_of(dataset, "train") + texts_of(dataset, "heldout")


def test_overwrite_replaces_all_and_nothing_else(tmp_path: Path) -> None:
    write_dataset(varied_documents(), tmp_path, ByteTokenizer(), 12_000, 0.2)
    (tmp_path / "train-notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(DataError, match="--overwrite"):
        write_dataset(varied_documents(30), tmp_path, ByteTokenizer(), 12_000, 0.2)
    assert contents(tmp_path) == before
    write_dataset(varied_documents(30), tmp_path, ByteTokenizer(), 1 << 20, 0.2, overwrite=True)
    tars = {path.name for path in tmp_path.glob("*.tar")}
    assert tars == {"train-000000.tar", "heldout-000000.tar"}
    assert (tmp_path / "train-notes.txt").read_text() == "mine"
    assert not list(verify_dataset(Dataset.open(tmp_path)))


def test_a_failure_leaves_the_old_data_set(tmp_path: Path) -> None:
    write_dataset(varied_documents(), tmp_path, ByteTokenizer(), 12_000, 0.2)
    before = contents(tmp_path)

    def broken() -> Any:
        yield from varied_documents(20)
        raise DataError("the source broke")

    with pytest.raises(DataError, match="the source broke"):
        write_dataset(broken(), tmp_path, ByteTokenizer(), 12_000, 0.2, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("documents", "fraction", "message"),
    [
        ([], 0.05, "no text: no document"),
        ([("a", b""), ("b", b"")], 0.05, "no text: 2 documents"),
        ([("a", b"x")], 1e-9, "no document of 1 "),
        ([("a", b"x")] * 3, 1 - 1e-9, "all 3 document"),
        ([("a", b"text")], 1.0, "heldout_fraction=1.0"),
        ([("a", b"text")], float("nan"), "heldout_fraction=nan"),
    ],
)
def test_too_little_text(
    tmp_path: Path, documents: list[tuple[str, bytes]], fraction: float, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write_dataset(documents, tmp_path / "d", ByteTokenizer(), heldout_fraction=fraction)
    assert not (tmp_path / "d" / "dataset.json").exists()


def test_a_file_at_the_output_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"{tmp_path / 'file'}.*: .*written"):
        write_dataset(varied_documents(), tmp_path / "file", ByteTokenizer())
