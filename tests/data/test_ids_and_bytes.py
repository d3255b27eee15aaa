"""Documents of token ids, and files of any kind as bytes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.datasets import documents_of
from support.launch import run_ranks
from support.tiny import tiny_overrides

from reformer_dist.data import ByteTokenizer, Dataset, TextOptions, read_bytes, read_ids, write_samples
from reformer_dist.errors import DataError

IDS = np.random.default_rng(0).integers(0, 70_000, 1000)


def sequences(*paths: Path, n_ids: int = 70_000, **options: Any) -> dict[str, list[int]]:
    samples = read_ids(paths, n_ids, **options)
    return {sample.name: np.frombuffer(sample.fields[0], "<u4").tolist() for sample in samples}


def test_arrays_and_lists(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", IDS.astype(np.uint32))
    np.save(tmp_path / "rows.npy", IDS[:12].reshape(3, 4))
    np.savez(tmp_path / "two.npz", a=IDS[:5], b=IDS[:6].reshape(2, 3))
    lines = "".join(json.dumps({"input_ids": IDS[:n].tolist()}) + "\n" for n in (3, 2))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    rows = {f"rows.npy:{n}": IDS[4 * n : 4 * n + 4].tolist() for n in range(3)}
    found = sequences(tmp_path)
    assert found == {
        "d.jsonl.gz:1": IDS[:3].tolist(),
        "d.jsonl.gz:2": IDS[:2].tolist(),
        "flat.npy": IDS.tolist(),
        **rows,
        "two.npz/a": IDS[:5].tolist(),
        "two.npz/b:0": IDS[:3].tolist(),
        "two.npz/b:1": IDS[3:6].tolist(),
    }
    sections = sequences(tmp_path / "flat.npy", section_bytes=1000)
    assert [len(ids) for ids in sections.values()] == [250] * 4
    assert [each for ids in sections.values() for each in ids] == IDS.tolist()


def test_columns_of_ids(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"codes": pyarrow.array([[1, 2], [3]], pyarrow.list_(pyarrow.uint16()))})
    parquet.write_table(table, tmp_path / "d.parquet")
    assert list(sequences(tmp_path / "d.parquet", field="codes").values()) == [[1, 2], [3]]
    with pytest.raises(DataError, match=r"d\.parquet: has no column 'input_ids', but codes"):
        sequences(tmp_path / "d.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.npy", np.array([1, 9, 10]), r"d\.npy: id 10 at position 2; .*--ids 10"),
        ("d.npy", np.array([[1, 2], [3, -1]]), r"d\.npy:1: id -1 at position 1"),
        ("d.npy", np.array([1.5]), r"d\.npy: holds \[1\] of float64"),
        ("d.npy", np.array([[[1]]]), r"d\.npy: holds \[1, 1, 1\]"),
        ("d.npy", np.array([object()]), r"d\.npy: can't be read .*pickle"),
        ("d.npy", b"\x93NUMPY torn", r"d\.npy: can't be read"),
        ("d.npz", b"PK torn", r"d\.npz: can't be read"),
        ("d.jsonl", b'{"input_ids": [1, 10]}\n', r"d\.jsonl:1: id 10 at position 1"),
        ("d.jsonl", b'{"input_ids": "text"}\n', r"d\.jsonl:1: field 'input_ids' is 'text'"),
        ("d.jsonl", b'{"input_ids": [1, true]}\n', r"d\.jsonl:1: field 'input_ids'"),
        ("d.jsonl", b'{"ids": [1]}\n', r"d\.jsonl:1: field 'input_ids' is None.*--text-field"),
        ("d.jsonl", b'{"input_ids": [1e400]}\n', r"d\.jsonl:1: field"),
        ("d.jsonl", b'{"input_ids": [99999999999999999999]}\n', r"d\.jsonl:1: holds an id beyond"),
        ("d.txt", b"1 2 3", r"d\.txt: --ids reads \.npy"),
    ],
)
def test_bad_ids_are_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        sequences(tmp_path / name, n_ids=10)


def test_a_model_of_ids(tmp_path: Path) -> None:
    """By the command, from an array whose end is held out; the run and its evaluation need no text."""
    np.save(tmp_path / "codes.npy", IDS % 300)
    given = [tmp_path / "codes.npy", "--ids", 300, "--output", tmp_path / "data", "--heldout", 0.3]
    run_ranks("reformer_dist.shards", 1, given, forked=True)
    dataset = Dataset.open(tmp_path / "data")
    assert (dataset.tokenizer.vocab_size, dataset.tokenizer.dtype) == (301, "uint16")
    train, heldout = (documents_of(dataset, split)[0][:-1].tolist() for split in ("train", "heldout"))
    assert train + heldout == (IDS % 300).tolist() and 250 < len(heldout) < 350
    keys = tiny_overrides(tmp_path / "data", tmp_path / "run", "trainer.max_steps=2", "trainer.eval_every=2")
    assert "step 2/2" in run_ranks("reformer_dist.train", 1, keys, forked=True)


def test_files_as_bytes(tmp_path: Path) -> None:
    """Whatever they are: nothing is decompressed, skipped or parsed."""
    files = {"a.gz": gzip.compress(b"text"), "b.json": b"{", "c": bytes(range(256)) * 10, "d.npy": b"\x93NUMPY"}
    root = tmp_path / "root"
    root.mkdir()
    for name, content in files.items():
        (root / name).write_bytes(content)
    assert {s.name: s.fields[0] for s in read_bytes([root])} == {
        f"root/{name}": text for name, text in files.items()
    }
    sections = list(read_bytes([root / "c"], TextOptions(section_bytes=1000)))
    assert [len(sample.fields[0]) for sample in sections] == [1280, 1280]
    assert b"".join(sample.fields[0] for sample in sections) == files["c"]
    write_samples(read_bytes([root / "c"]), tmp_path / "data", ByteTokenizer(), heldout_fraction=0.1)
    dataset = Dataset.open(tmp_path / "data")
    assert [len(documents_of(dataset, split)) for split in ("train", "heldout")] == [1, 1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file in .*empty"):
        list(read_bytes([tmp_path / "empty"]))
