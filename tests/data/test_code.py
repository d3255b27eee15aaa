"""Repositories as documents, and texts reordered to fill in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.datasets import documents_of
from support.launch import run_ranks

from reformer_dist.data import (
    BpeTokenizer,
    ByteTokenizer,
    Dataset,
    FillInMiddle,
    RawSample,
    SkippedFiles,
    read_repositories,
    write_samples,
)
from reformer_dist.data.prepare.repository import in_import_order
from reformer_dist.errors import DataError

FILES = {
    "pkg/__init__.py": "from pkg.b import x\n",
    "pkg/a.py": "import os\nfrom . import b\nfrom .sub.c import (\n    y,\n    z,\n)\n",
    "pkg/b.py": "from .sub import c\n",
    "pkg/sub/c.py": "import json, util\n",
    "util.py": "x = 'é'",
    "web/app.ts": "import {f} from './lib'\nconst g = require('../web/g.js')\n",
    "web/g.js": "",
    "web/lib/index.ts": "export const f = 1\n",
    "src/main.c": '#include <stdio.h>\n#include "part.h"\n',
    "src/part.h": '#include "main.c"\n',  # a cycle
    "notes.json": "{}\n",
}


def write_repository(folder: Path) -> Path:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "image.png").write_bytes(b"\x89PNG\0")
    (folder / "data.zip").write_bytes(b"PK\x03\x04")
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("hidden")
    return folder


def test_a_repository_is_one_document(tmp_path: Path) -> None:
    folder, skipped = write_repository(tmp_path / "repo"), SkippedFiles()
    [sample] = read_repositories([folder], skipped=skipped)
    names = [name for name in sorted(FILES) if FILES[name]]
    texts = [f"# path: {name}\n{FILES[name]}" for name in names]
    parts = [(text if text.endswith("\n") else text + "\n").encode() for text in texts]
    assert (sample.name, sample.fields, sample.part_sizes) == ("repo", (b"".join(parts),), tuple(map(len, parts)))
    assert [count for count, _ in skipped.values()] == [1, 1]
    [other] = read_repositories([folder], order="imports")
    assert sorted(other.fields[0].splitlines()) == sorted(sample.fields[0].splitlines())
    with pytest.raises(DataError, match=r"util\.py: is no folder"):
        list(read_repositories([folder / "util.py"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no text"):
        list(read_repositories([tmp_path / "empty"]))


def test_imported_files_come_first() -> None:
    order = in_import_order({name: text.encode() for name, text in FILES.items()})
    assert sorted(order) == sorted(FILES)
    for first, second in (
        ("util.py", "pkg/sub/c.py"),
        ("pkg/sub/c.py", "pkg/b.py"),
        ("pkg/b.py", "pkg/a.py"),
        ("pkg/b.py", "pkg/__init__.py"),
        ("web/lib/index.ts", "web/app.ts"),
        ("web/g.js", "web/app.ts"),
        ("src/part.h", "src/main.c"),
    ):
        assert order.index(first) < order.index(second)


def test_a_text_is_filled_in() -> None:
    """The parts of a reordered text are the text, cut between characters; rates are kept."""
    texts = [(f"é{number}" * 5).encode() for number in range(400)]
    cuts = [FillInMiddle(0.5).cut(text) for text in texts]
    assert 150 < sum(cut is not None for cut in cuts) < 250
    for text, cut in zip(texts, cuts, strict=True):
        if cut is not None:
            prefix, suffix, middle = cut
            assert prefix + middle + suffix == text
            assert all(piece.decode() is not None for piece in cut)
    assert not any(map(FillInMiddle(0.0).cut, texts)) and all(map(FillInMiddle(1.0).cut, texts))


def test_files_are_reordered_one_by_one(tmp_path: Path) -> None:
    """Of training samples only; the tokens between the parts are special."""
    fim = FillInMiddle(1.0)
    tokenizer = BpeTokenizer.train([b"some text of words " * 9], 280, fim.tokens)
    parts = (b"first file of words\n", b"second file of text\n")
    more = {"part_sizes": tuple(map(len, parts)), "fill_in_middle": fim}
    samples = [RawSample(f"r{n}", (b"".join(parts),), **more) for n in range(2)]
    write_samples(samples[:1], tmp_path / "d", tokenizer, heldout=samples[1:])
    dataset = Dataset.open(tmp_path / "d")
    [ids], [plain] = (documents_of(dataset, split) for split in ("train", "heldout"))
    assert dataset.tokenizer.decode(plain) == b"".join(parts).decode()
    starts = [index for index, token in enumerate(ids) if token in fim.token_ids(tokenizer)]
    assert [int(ids[index]) for index in starts] == fim.token_ids(tokenizer) * 2
    pieces = [tokenizer.decode(ids[a + 1 : b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    assert [pieces[n] + pieces[n + 2] + pieces[n + 1] for n in (0, 3)] == [part.decode() for part in parts]
    assert dataset.total("text_bytes", "train") == sum(map(len, parts))
    for other in (ByteTokenizer(), BpeTokenizer.train([b"text"], 260)):
        with pytest.raises(DataError, match=r"--fim 1: .*no special token <\|fim_prefix\|>.*--fim-tokens"):
            fim.token_ids(other)


def test_the_command(tmp_path: Path) -> None:
    folders = [write_repository(tmp_path / f"repo{n}") for n in range(3)]
    for n, folder in enumerate(folders):
        (folder / "own.py").write_text(f"number = {n}\n" * 30)
    given = [*folders, "--repository", "--file-order", "imports", "--output", tmp_path / "d", "--heldout", 0.4]
    run_ranks(
        "reformer_dist.shards", 1, [*given, "--tokenizer", "bpe", "--vocab-size", 300, "--fim", 0.9], forked=True
    )
    dataset = Dataset.open(tmp_path / "d")
    assert dataset.total("samples", "train") + dataset.total("samples", "heldout") == 3
    middle = dataset.tokenizer._inner.token_to_id("<|fim_middle|>")
    assert (
        all(middle in ids for ids in documents_of(dataset)) and middle not in documents_of(dataset, "heldout")[0]
    )
