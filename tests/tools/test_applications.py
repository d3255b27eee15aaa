"""Every application at a tiny size, from raw files to evaluation, with tools/application.py."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model.dim=32", "model.n_layers=1", "data.batch_size=8", "trainer.micro_batch_size=4"]
SHORT = ["trainer.max_steps=4", "trainer.eval_every=4", "data.eval_rows=8"]

pytestmark = pytest.mark.slow


def write_translation(folder: Path) -> list[str]:
    draw, words = random.Random(0), ["ein", "Hund", "läuft", "über", "grünes", "Gras"]
    files = [folder / name for name in ("train.en", "train.de", "test.en", "test.de")]
    for path, count in zip(files, (80, 80, 6, 6), strict=True):
        path.write_text("\n".join(" ".join(draw.choices(words, k=6)) for _ in range(count)) + "\n")
    return ["--train", *map(str, files[:2]), "--heldout", *map(str, files[2:])]


def write_squad(folder: Path) -> list[str]:
    contexts = [f"In {year} the bridge over river {year % 7} was built." * 20 for year in range(1800, 1840)]
    paragraphs = [
        {
            "context": context,
            "qas": [{"id": str(n), "question": "When?", "answers": [{"answer_start": 3, "text": context[3:7]}]}],
        }
        for n, context in enumerate(contexts)
    ]
    for name, part in (("train", paragraphs[4:]), ("dev", paragraphs[:4])):
        (folder / f"{name}.json").write_text(json.dumps({"data": [{"paragraphs": part}]}))
    return ["--train", str(folder / "train.json"), "--heldout", str(folder / "dev.json")]


def write_lines(folder: Path, *fields: str) -> list[str]:
    path = folder / "raw.jsonl"
    records = [{name: f"{name} number {n % 5} of {n}" for name in fields} for n in range(60)]
    for n, record in enumerate(records):
        if "label" in record:
            record["label"] = "abc"[n % 3]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return ["--train", str(path), "--heldout", str(path)]


@pytest.mark.parametrize(
    ("name", "measures"),
    [
        ("translation", ["sacreBLEU: ", "signature: nrefs:1|case:mixed", "written:"]),
        ("summarisation", ["ROUGE-1: ", "ROUGE-2: ", "ROUGE-L: "]),
        ("question_answering", ["exact match: ", "F1: ", "questions: 36", "questions: 4"]),
        ("classification", ["held-out accuracy: "]),
        ("duplication", ["rounds", "accuracy"]),
        ("induction", ["held-out accuracy: ", "256 tokens: "]),
    ],
)
def test_from_raw_files_to_a_measure(name: str, measures: list[str], tmp_path: Path) -> None:
    raw = {
        "translation": write_translation,
        "question_answering": write_squad,
        "summarisation": lambda folder: write_lines(folder, "document", "summary"),
        "classification": lambda folder: write_lines(folder, "text", "label"),
        "duplication": lambda folder: write_lines(folder, "prompt", "completion"),
        "induction": lambda folder: [],  # generates its data
    }[name](tmp_path)
    command = [sys.executable, str(ROOT / "tools" / "application.py"), name, *raw]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

    def run(*overrides: str) -> str:
        done = subprocess.run(
            [*command, *SMALL, *SHORT, *overrides], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    output = run()
    for words in measures:
        assert words in output
    if name == "duplication":
        assert "nothing to train" in run()
