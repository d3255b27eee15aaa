"""Compressed files, tables in columns, and files whose syntax would be read as text."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.datasets import write_tar

from reformer_dist.data import SkippedFiles, TextOptions, read_labeled, read_records, read_text
from reformer_dist.data.prepare.raw_files import read_counter
from reformer_dist.errors import DataError

TEXTS = ["one", "zwölf, in Worten\n", "", "x" * 100_000]


def texts_of(*paths: Path, skipped: SkippedFiles | None = None, **options: Any) -> list[str]:
    return [sample.fields[0].decode() for sample in read_text(paths, TextOptions(**options), skipped)]


def zstd_frames(content: bytes) -> bytes:
    """Two frames, since multi-threaded compressors write several."""
    package = pytest.importorskip("zstandard")
    half = len(content) // 2
    return b"".join(package.compress(part) for part in (content[:half], content[half:]))


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd_frames,
}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    """Alone, in a folder and as members of a .tar, which may be compressed itself; torn ones are named."""
    compress = COMPRESSIONS[suffix]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    root = tmp_path / "root"
    root.mkdir()
    (root / f"a.jsonl{suffix}").write_bytes(compress(lines))
    (root / f"b.txt{suffix}").write_bytes(compress(b"text"))
    write_tar(root / "c.tar", [(f"d.jsonl{suffix}", compress(lines)), (f"e.txt{suffix}", compress(b"member"))])
    (root / f"f.tar{suffix}").write_bytes(compress((root / "c.tar").read_bytes()))
    before = read_counter.n_bytes
    assert texts_of(root) == [*TEXTS, "text", *TEXTS, "member", *TEXTS, "member"]
    assert read_counter.n_bytes - before == sum(path.stat().st_size for path in root.iterdir())
    assert texts_of(root / f"b.txt{suffix}") == ["text"]

    torn = tmp_path / f"torn.jsonl{suffix}"
    for broken in (compress(lines)[:-9], b"nothing of the kind"):
        torn.write_bytes(broken)
        with pytest.raises(DataError, match=rf"torn\.jsonl{suffix}: can't be read"):
            texts_of(torn)
        write_tar(tmp_path / "torn.tar", [(torn.name, broken)])
        with pytest.raises(DataError, match=rf"torn\.tar: torn\.jsonl{suffix}: can't be read"):
            texts_of(tmp_path / "torn.tar")
    torn.write_bytes(compress(compress(lines)))
    with pytest.raises(DataError, match="compressed once"):
        texts_of(torn)


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    """By the suffix; .stream is Arrow's format of streams, which `datasets` writes."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, ipc, parquet

    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=3)
    elif path.suffix == ".feather":
        feather.write_feather(table, path)
    else:
        writer = ipc.new_stream if ".stream" in path.name else ipc.new_file
        with writer(str(path), table.schema) as file:
            file.write_table(table, max_chunksize=3)


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow", "d.stream.arrow", "d.feather"])
def test_columns(tmp_path: Path, name: str) -> None:
    path = tmp_path / "root" / name
    path.parent.mkdir()
    numbers = list(range(len(TEXTS)))
    write_table(path, {"n": numbers, "body": TEXTS, "spans": [[[0, 1]]] * len(TEXTS)})
    for source in (path, path.parent):
        assert texts_of(source, text_field="body") == TEXTS
        assert [s.fields for s in read_records([source], ["body"])] == [(text.encode(),) for text in TEXTS]
        with pytest.raises(DataError, match=rf"{name}: has no column 'text', but n, body.*--text-field"):
            texts_of(source)
    assert next(read_labeled([path], "body", "spans")).label_spans == ((0, 1),)
    with pytest.raises(DataError, match=rf"{name}:1: field 'n' is 0; it must be a string"):
        texts_of(path, text_field="n")
    write_tar(tmp_path / "d.tar", [(name, path.read_bytes())])
    assert texts_of(tmp_path / "d.tar", text_field="body") == TEXTS

    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"nothing of the kind"):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=rf"{name}: can't be read"):
            texts_of(path, text_field="body")
    for suffix in (".gz", ".bz2"):
        (tmp_path / f"{name}{suffix}").write_bytes(COMPRESSIONS[suffix](whole))
        with pytest.raises(DataError, match=rf"{name}{suffix}: is compressed as a whole"):
            texts_of(tmp_path / f"{name}{suffix}")


def write_saved_dataset(folder: Path, texts: list[str]) -> None:
    """The layout of `Dataset.save_to_disk`, with a cached file that is no part of the data."""
    folder.mkdir(parents=True)
    files = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    for name, part in zip(files, (texts[:2], texts[2:]), strict=True):
        write_table(folder / f"{name[:-6]}.stream.arrow", {"text": part})
        (folder / f"{name[:-6]}.stream.arrow").rename(folder / name)
    write_table(folder / "cache-12.arrow", {"text": ["not wanted"]})
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in files]}))


def test_a_data_set_saved_by_hugging_face(tmp_path: Path) -> None:
    write_saved_dataset(tmp_path / "saved/train", TEXTS)
    write_saved_dataset(tmp_path / "saved/test", TEXTS)
    assert texts_of(tmp_path / "saved/train") == TEXTS
    assert texts_of(tmp_path / "saved") == TEXTS * 2
    assert len(list(read_records([tmp_path / "saved/train"], ["text"]))) == len(TEXTS)
    (tmp_path / "saved/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    for read in (lambda: texts_of(tmp_path / "saved"), lambda: list(read_records([tmp_path / "saved"], ["text"]))):
        with pytest.raises(DataError, match=r"holds the splits.*saved/train, .*saved/test"):
            read()
    (tmp_path / "saved/train/state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json: lists no _data_files"):
        texts_of(tmp_path / "saved/train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("n.ipynb", b'{"cells": []}', "notebook.* --as-text .ipynb"),
        ("g.fa", b">chr1\nACGT\n", "FASTA.*--fasta"),
        ("g.FNA", b">chr1\nACGT\n", "FASTA.*--fasta"),
        ("d.txt", b'{"text": "one"}\n{"text": "two"}\n', r"\.jsonl"),
        ("d", b'  {\n "text": "one"}', r"\.jsonl"),
    ],
)
def test_syntax_is_not_read_as_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / name).write_bytes(content)
    (root / f"{name}.gz").write_bytes(gzip.compress(content))
    write_tar(tmp_path / "d.tar", [(name if "." in name else f"{name}.txt", content), ("x.txt", b"text")])
    for path in (root, root / name, root / f"{name}.gz"):
        with pytest.raises(DataError, match=message):
            texts_of(path)
    if name in ("n.ipynb", "d.txt"):
        suffix = Path(name).suffix
        assert texts_of(root, as_text=(suffix,)) == [content.decode()] * 2
    if name.startswith("d"):
        with pytest.raises(DataError, match=message):
            texts_of(tmp_path / "d.tar")
    skipped = SkippedFiles()
    (root / "x.txt").write_bytes(b"text")
    assert texts_of(root, skip_packed=True, skipped=skipped) == ["text"]
    assert [count for count, _ in skipped.values()] == [2]


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, extra in (("d.txt.zst", "zstd"), ("d.parquet", "arrow")):
        (tmp_path / name).write_bytes(b"PAR1 anything")
        with pytest.raises(DataError, match=rf"{name}: .*pip install 'reformer_dist\[{extra}\]'"):
            texts_of(tmp_path / name)
