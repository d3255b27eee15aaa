"""tools/make_shards.py on the raw files of every task, and its errors for invalid files."""

from __future__ import annotations

import gzip
import json
import os
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.pieces import train_pieces

from reformer_dist.checkpoint import export as checkpoint_export
from reformer_dist.data import BpeTokenizer, Corpus, Dataset, RowSelection, read_split

TOOLS = Path(__file__).parents[2] / "tools"


def make_shards(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs the tool in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["make_shards.py", *map(str, arguments)])
    try:
        runpy.run_path(str(TOOLS / "make_shards.py"), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def write_lines(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


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
    assert "skipped: 20 documents" in capsys.readouterr().out
    dataset = Dataset.open(tmp_path / "data")
    assert (dataset.total("samples", "train"), dataset.total("samples", "heldout")) == (40, 1)
    [sample] = read_split(Corpus([dataset]), RowSelection())
    assert [dataset.tokenizer.decode(field) for field in sample.fields] == ["one cat", "eine Katze"]

    (tmp_path / "a.de").write_bytes(b"eine Katze\n")
    assert make_shards(monkeypatch, *given, "--overwrite") == 1
    assert "a.de: ends after 1 line" in capsys.readouterr().err


def test_json_lines_with_labels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    lines = [{"text": f"text {n}", "kind": "ab"[n % 2], "other": n} for n in range(40)]
    path = write_lines(tmp_path / "train.jsonl", *lines)
    given = [path, "--fields", "text", "--label", "kind", "--output", tmp_path / "data"]
    assert make_shards(monkeypatch, *given, "--heldout", 0.3) == 0
    dataset = Dataset.open(tmp_path / "data")
    assert (dataset.fields, dataset.labels) == (["text"], ["a", "b"])
    assert {sample.metadata["label"] for sample in read_split(Corpus([dataset]), RowSelection())} == {"a", "b"}

    odd = write_lines(tmp_path / "odd.jsonl", {"text": "x", "kind": "c"})
    assert make_shards(monkeypatch, *given, "--heldout-from", odd, "--overwrite") == 1
    assert "odd.jsonl:1: " in (error := capsys.readouterr().err) and "label 'c'" in error
    short = write_lines(tmp_path / "short.jsonl", {"text": "x"})
    assert make_shards(monkeypatch, *given, "--heldout-from", short, "--overwrite") == 1
    assert "short.jsonl:1: " in (error := capsys.readouterr().err) and "field 'kind'" in error


def test_squad(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    path = squad(tmp_path / "train.json")
    given = ["--squad", path, "--output", tmp_path / "data", "--heldout-from"]
    assert make_shards(monkeypatch, *given, path) == 0
    dataset = Dataset.open(tmp_path / "data")
    [sample] = read_split(Corpus([dataset]), RowSelection())
    assert dataset.fields == ["question", "context"]
    assert sample.metadata == {"id": "q1", "answers": [[11, "Bern"]] * 2}  # in bytes: ü takes two
    assert dataset.tokenizer.decode(sample.fields[1][11:15]) == "Bern"

    for wrong, words in (
        (
            squad(tmp_path / "1.json", start=9),
            "question q1: its answer 'Bern' ",
        ),
        (squad(tmp_path / "2.json", answer=""), "question q1: its answer '' "),
        (write_lines(tmp_path / "3.json", {"data": [{}]}), "(KeyError: 'paragraphs')"),
    ):
        assert make_shards(monkeypatch, *given, wrong, "--overwrite") == 1
        assert words in capsys.readouterr().err


def test_a_vocabulary_that_normalises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """It shifts answers, so question answering is rejected; for plain text the change is reported."""
    specification = train_pieces(tmp_path, ["two words of text"] * 9).save(tmp_path)
    weights = SimpleNamespace(record=SimpleNamespace(tokenizer=specification), folder=tmp_path)
    monkeypatch.setattr(checkpoint_export, "open_weights", lambda path: weights)
    given = ["--tokenizer-of", "MODEL", "--output", tmp_path / "data"]
    assert make_shards(monkeypatch, "--squad", squad(tmp_path / "train.json"), *given) == 1
    assert "MODEL: the tokenizer normalizes" in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "two  words {n}"}}\n' for n in range(40)))
    assert make_shards(monkeypatch, tmp_path / "a.jsonl", *given, "--heldout", 0.3) == 0
    output = capsys.readouterr().out
    assert "normalized by the tokenizer: 40 documents" in output and "UTF-8" not in output
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    bpe = ["--tokenizer", "bpe", "--output", tmp_path / "bpe", "--heldout", 0.3]
    assert make_shards(monkeypatch, tmp_path / "a.jsonl", tmp_path / "latin.txt", *bpe) == 0
    assert "replaced: invalid UTF-8 in 1 document" in capsys.readouterr().out


def test_a_given_vocabulary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    trained = BpeTokenizer.train([b"some words"] * 9, 260).save(tmp_path)
    path = tmp_path / trained["file"]
    document = json.loads(path.read_text())
    [token] = document["added_tokens"]
    document["added_tokens"] += [token | {"id": 260, "content": "</s>"}, token | {"id": 261, "content": "<user>"}]
    path.write_text(json.dumps(document))
    lines = "".join(json.dumps({"text": f"<user>words {n}</s>"}) + "\n" for n in range(40))
    (tmp_path / "a.jsonl").write_text(lines)
    given = [tmp_path / "a.jsonl", "--tokenizer", "bpe", "--heldout", 0.3]
    from_file = [*given, "--tokenizer-file", path, "--eot-token", "</s>"]
    for name, special, n_used in (("plain", [], 0), ("special", ["--special-tokens"], 1)):
        assert make_shards(monkeypatch, *from_file, *special, "--output", tmp_path / name) == 0
        dataset = Dataset.open(tmp_path / name)
        ids = dataset.tokenizer.encode(b"<user>words</s>").tolist()
        assert dataset.tokenizer.eos_id == 260 and ids.count(261) == n_used and 260 not in ids
    assert make_shards(monkeypatch, *given, "--eot-token", "</s>", "--output", tmp_path / "none") == 2
    assert "--eot-token and --special-tokens need --tokenizer-file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "a"], "--source and --target"),
        (["in", "--source", "a", "--target", "b"], "inputs or --source and --target"),
        (["in", "--squad", "--fields", "a"], "--source, --fields, --label-spans, --squad"),
        (["in", "--label", "a"], "--label needs --fields"),
        ([], "inputs or --source"),
        (["--source", "a", "--target", "b", "--heldout-from", "c"], "--heldout-from needs two files"),
        (["in", "--heldout", "2"], "--heldout 2.0: "),
        (["in", "--heldout", "nan"], "--heldout nan: "),
        (["in", "--shard-mb", "0"], "--shard-mb 0.0: "),
        (["in", "--shard-mb", "inf"], "--shard-mb inf: "),
    ],
)
def test_arguments_that_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], words: str
) -> None:
    assert make_shards(monkeypatch, *arguments, "--output", os.devnull) == 2
    assert words in capsys.readouterr().err


def test_label_spans_are_characters_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Größe? Sehr groß."
    raw = write_lines(tmp_path / "raw.jsonl", *({"body": text, "spans": [[0, 2], [7, 16]]},) * 3)
    arguments = ("--text-field", "body", "--label-spans", "spans", "--output", tmp_path / "data")
    assert make_shards(monkeypatch, raw, *arguments, "--heldout-from", raw) == 0
    [sample, *_] = read_split(Corpus.open([tmp_path / "data"]), RowSelection(split="heldout"))
    parts = [
        bytes(sample.fields[0][start:stop].tolist()).decode() for start, stop in sample.metadata["label_spans"]
    ]
    assert parts == ["Gr", "Sehr groß"]


@pytest.mark.parametrize("spans", [None, [], [[3, 3]], [[0, 18]], [[-1, 2]], ["0", "1"], [[0, 1.5]], "[[0, 1]]"])
def test_invalid_label_spans_are_refused(
    spans: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_lines(tmp_path / "raw.jsonl", {"text": "Größe? Sehr groß.", "spans": spans})
    arguments = (raw, "--label-spans", "spans", "--heldout-from", raw, "--output", tmp_path / "data")
    assert make_shards(monkeypatch, *arguments) == 1
    assert "raw.jsonl:1: field 'spans' is" in capsys.readouterr().err


def test_progress_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("reformer_dist.shards.progress.LINE_SECONDS", 0.0)
    monkeypatch.setattr("reformer_dist.data.prepare.encode_parallel.BATCH_BYTES", 4096)
    path = write_lines(tmp_path / "d.jsonl", *({"text": f"text {n} " * 20} for n in range(200)))
    assert make_shards(monkeypatch, path, "--output", tmp_path / "d", "--tokenizer", "bpe") == 0
    shown = capsys.readouterr().out
    assert re.search(r"^tokenizing: 100%, [\d.]+ MB/s of text, 0:00:00 left$", shown, re.MULTILINE)
    assert "reading for the vocabulary: " in shown
    assert re.search(r"[\d.]+ MB of text per second", shown)
