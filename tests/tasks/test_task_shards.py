"""tools/make_shards.py on the raw files of every task, and what it says of files that are wrong."""

from __future__ import annotations

import gzip
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from task_data import write_lines

from reformer_dist.data import Corpus, Dataset, split_samples

TOOLS = Path(__file__).parents[2] / "tools"


def make_shards(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Its exit status, in this process."""
    monkeypatch.setattr(sys, "argv", ["make_shards.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOLS / "make_shards.py"), run_name="__main__")
    return int(ended.value.code or 0)


def squad(path: Path, *, start: int = 10, answer: str = "Bern") -> Path:
    question = {"id": "q1", "question": "Where?", "answers": [{"text": answer, "answer_start": start}] * 2}
    paragraph = {"context": "Zürich or Bern.", "qas": [question]}
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]}))
    return path


def test_parallel_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    with gzip.open(tmp_path / "a.en.gz", "wb") as file:
        file.write(b"a cat\n\na dog\n" * 20)
    (tmp_path / "a.de").write_bytes(b"eine Katze\nleer\nein Hund\n" * 20)
    (tmp_path / "t.en").write_bytes(b"one cat\n")
    (tmp_path / "t.de").write_bytes(b"eine Katze")
    given = ["--source", tmp_path / "a.en.gz", "--target", tmp_path / "a.de", "--output", tmp_path / "data"]
    bpe = ["--tokenizer", "bpe", "--vocab-size", 280]
    assert make_shards(monkeypatch, *given, *bpe, "--heldout-from", tmp_path / "t.en", tmp_path / "t.de") == 0
    assert "left out: 20 documents that, or one of whose fields, are empty" in capsys.readouterr().out
    dataset = Dataset.open(tmp_path / "data")
    assert (dataset.total("samples", "train"), dataset.total("samples", "heldout")) == (40, 1)
    [sample] = split_samples(Corpus([dataset]))
    assert [dataset.tokenizer.decode(field) for field in sample.fields] == ["one cat", "eine Katze"]

    (tmp_path / "a.de").write_bytes(b"eine Katze\n")
    assert make_shards(monkeypatch, *given, "--overwrite") == 1
    assert "a.de: ends after 1 lines; line 2 of" in capsys.readouterr().err


def test_json_lines_with_labels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    lines = [{"text": f"text {n}", "kind": "ab"[n % 2], "other": n} for n in range(40)]
    path = write_lines(tmp_path / "train.jsonl", *lines)
    given = [path, "--fields", "text", "--label", "kind", "--output", tmp_path / "data"]
    assert make_shards(monkeypatch, *given, "--heldout", 0.3) == 0
    dataset = Dataset.open(tmp_path / "data")
    assert (dataset.fields, dataset.labels) == (["text"], ["a", "b"])
    assert {sample.facts["label"] for sample in split_samples(Corpus([dataset]))} == {"a", "b"}

    odd = write_lines(tmp_path / "odd.jsonl", {"text": "x", "kind": "c"})
    assert make_shards(monkeypatch, *given, "--heldout-from", odd, "--overwrite") == 1
    assert "odd.jsonl:1: its label 'c' is unknown; it must be one of" in capsys.readouterr().err
    short = write_lines(tmp_path / "short.jsonl", {"text": "x"})
    assert make_shards(monkeypatch, *given, "--heldout-from", short, "--overwrite") == 1
    assert "short.jsonl:1: field 'kind' is None; it must be a string" in capsys.readouterr().err


def test_squad(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    path = squad(tmp_path / "train.json")
    given = ["--squad", path, "--output", tmp_path / "data", "--heldout-from"]
    assert make_shards(monkeypatch, *given, path) == 0
    dataset = Dataset.open(tmp_path / "data")
    [sample] = split_samples(Corpus([dataset]))
    assert dataset.fields == ["question", "context"]
    assert sample.facts == {"id": "q1", "answers": [[11, "Bern"]] * 2}  # in bytes: ü takes two
    assert dataset.tokenizer.decode(sample.fields[1][11:15]) == "Bern"

    for wrong, words in (
        (
            squad(tmp_path / "1.json", start=9),
            "question q1: its answer 'Bern' is said to stand at 9; the context has",
        ),
        (squad(tmp_path / "2.json", answer=""), "question q1: its answer '' is said to stand at 10"),
        (write_lines(tmp_path / "3.json", {"data": [{}]}), "is not in SQuAD's format (KeyError: 'paragraphs')"),
    ):
        assert make_shards(monkeypatch, *given, wrong, "--overwrite") == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "a"], "--source and --target go together"),
        (["in", "--source", "a", "--target", "b"], "give either inputs or --source and --target"),
        (["in", "--squad", "--fields", "a"], "--source, --fields and --squad exclude one another"),
        (["in", "--label", "a"], "--label needs --fields"),
        ([], "give either inputs or"),
        (["--source", "a", "--target", "b", "--heldout-from", "c"], "--heldout-from needs two files"),
    ],
)
def test_arguments_that_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], words: str
) -> None:
    assert make_shards(monkeypatch, *arguments, "--output", os.devnull) == 2
    assert words in capsys.readouterr().err
