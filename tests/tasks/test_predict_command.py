"""reformer-predict: arguments, JSON lines and lines of text in; JSON lines of predictions out."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from task_data import WORDS, make

import reformer_dist
from reformer_dist.checkpoint import RunRecord, write_export
from reformer_dist.convert import _ConvertedWeights
from reformer_dist.errors import UserError
from reformer_dist.predict import build_parser, run_prediction
from reformer_dist.run.compose import to_dict

TWO_SIDED = ("model.causal=false",)
CHANGED = {
    "sequence_classification": TWO_SIDED,
    "masked_language_model": TWO_SIDED,
    "question_answering": (*TWO_SIDED, "task.stride=8"),
    "sequence_to_sequence": ("data.seq_len=8", "task.max_source_len=64"),
    "language_model": (),
}
CONTEXT = "red green blue grey white black"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of each kind, with random weights."""
    folder = tmp_path_factory.mktemp("models")
    for kind, changed in CHANGED.items():
        labels = tuple(WORDS) if kind == "sequence_classification" else ()
        task = make(kind, folder, *changed, labels=labels)
        weights = {name: 2 * weight.detach() for name, weight in task.build_model().named_parameters()}
        shapes = {name: list(weight.shape) for name, weight in weights.items()}
        record = RunRecord(to_dict(task.config), {"kind": "bytes"}, 257, shapes, labels=list(labels))
        write_export(_ConvertedWeights(folder, record, weights, []), folder / kind)
    return folder


@pytest.fixture
def predict(models: Path, capsys: pytest.CaptureFixture[str]):
    def run(kind: str, *arguments: str) -> list[dict[str, Any]]:
        run_prediction(build_parser().parse_intermixed_args([str(models / kind), *arguments]))
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def plain(prediction: Any) -> Any:
    """As JSON gives it back, with rounded numbers."""
    return json.loads(
        json.dumps(asdict(prediction)), parse_float=lambda digits: pytest.approx(float(digits), abs=1e-4)
    )


def test_each_task_predicts_as_the_library_does(predict, models: Path) -> None:
    load = reformer_dist.load
    texts = ["red green", "white", "blue blue blue"]
    given = [word for text in texts for word in ("--text", text)]
    for size in ("1", "2", "8"):
        found = predict("sequence_classification", *given, "--batch", size)
        expected = load(models / "sequence_classification").classify(texts)
        assert [line["prediction"] for line in found] == [plain(each) for each in expected]
        assert [line["text"] for line in found] == texts
    [found] = predict("masked_language_model", "--text", "r<mask>d <mask>", "--top-k", "2")
    filled = load(models / "masked_language_model").fill_mask("r<mask>d <mask>", top_k=2)
    assert found["prediction"] == plain(filled) and [len(mask) for mask in filled.masks] == [2, 2]
    questions = ("--question", "red", "--question", "blue", "--context", CONTEXT)
    answers = load(models / "question_answering").answer(["red", "blue"], CONTEXT)
    found = predict("question_answering", *questions)
    assert [line["prediction"] for line in found] == [plain(each) for each in answers]
    for beams in ("1", "2"):
        [found] = predict("sequence_to_sequence", "--source", "red blue", f"task.beams={beams}")
        model = load(models / "sequence_to_sequence", f"task.beams={beams}")
        assert found["prediction"] == plain(model.write("red blue"))


def test_json_lines_keep_their_other_fields_and_their_order(predict, tmp_path: Path, monkeypatch) -> None:
    records = [{"id": n, "body": f"{WORDS[n % 6]} é", "label": None} for n in range(5)]
    lines = "\n\n".join(json.dumps(record) for record in records)
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text(lines)
    options = ("--fields", "body", "--batch", "2")
    printed = predict("sequence_classification", "--jsonl", str(file), *options)
    assert [{k: v for k, v in line.items() if k != "prediction"} for line in printed] == records
    assert predict("sequence_classification", "--jsonl", str(file), *options, "--output", str(output)) == []
    assert [json.loads(line) for line in output.read_text().splitlines()] == printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines.encode())))
    assert predict("sequence_classification", "--jsonl", "-", *options) == printed
    text = "".join(f"{record['body']}\n" for record in records)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    found = predict("sequence_classification", "--lines", "-", "--batch", "2")
    assert [line["prediction"] for line in found] == [line["prediction"] for line in printed]


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("language_model", ["--text", "a"], r"task\.kind=language_model: .*reformer-generate"),
        ("sequence_classification", [], r"--text: .*--jsonl .*got 0"),
        ("sequence_classification", ["--text", "a", "--lines", "-"], "got 2"),
        ("sequence_classification", ["--source", "a"], r"--source: .*--text"),
        ("sequence_classification", ["--text", "a", "--batch", "0"], "--batch 0: "),
        ("sequence_classification", ["--text", "a", "--fields", "b"], "--fields b: needs --jsonl"),
        ("sequence_classification", ["--jsonl", "{in}", "--fields", "b", "c"], "--fields b c: must name 1"),
        (
            "sequence_classification",
            ["--jsonl", "{in}", "--batch", "2"],
            r"in\.jsonl:2: has no field text",
        ),
        ("sequence_classification", ["--jsonl", "{in}", "--fields", "other"], r"in\.jsonl:3: is not JSON"),
        ("sequence_classification", ["--jsonl", "no/such"], "no/such: can't be read"),
        ("question_answering", ["--lines", "-"], "--lines -: .*--question and --context"),
        ("question_answering", ["--question", "a"], "got 1 and 0"),
        ("masked_language_model", ["--text", "<mask>", "--text", "plain"], "input 1 to input 2: text='plain': "),
    ],
)
def test_bad_inputs_are_refused_by_name(predict, tmp_path: Path, kind: str, arguments, words: str) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "a", "other": "b"}\n{"other": "b"}\n{"tex\n')
    output = tmp_path / "out.jsonl"
    given = [str(file) if word == "{in}" else word for word in arguments]
    with pytest.raises(UserError, match=words):
        predict(kind, *given, "--output", str(output))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
