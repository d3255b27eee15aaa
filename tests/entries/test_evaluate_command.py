"""reformer-evaluate on a small trained run: checks of the data, and baselines of the text."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.launch import run_ranks
from support.tiny import WORDS, tiny_overrides, write_tiny_dataset

from reformer_dist.data import (
    BpeTokenizer,
    ByteTokenizer,
    Corpus,
    IdTokenizer,
    RawSample,
    write_dataset,
    write_samples,
)
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import UserError
from reformer_dist.evaluate import _heldout_text, _open, build_parser, print_report
from reformer_dist.run.pretrained import LoadedModel
from reformer_dist.tasks.text_metrics import order0_bits_per_byte


def opened(trained: Path, data: Path, job: Runtime) -> tuple[argparse.Namespace, LoadedModel, Corpus]:
    arguments = build_parser().parse_args([str(trained), f"data.path={data}"])
    return arguments, *_open(arguments, [], job)


def test_data_of_another_tokenizer_are_refused(trained: Path, tmp_path: Path, job: Runtime) -> None:
    """Also with the same vocabulary size but other ids, with which the loss would be meaningless."""
    other = BpeTokenizer.train([b"text"], 257)
    documents = [(f"{number}", f"{number} {' '.join(WORDS)}".encode()) for number in range(20)]
    write_dataset(documents, tmp_path / "other", other, heldout_fraction=0.3)
    right = r"other: .*tokenizer.*--tokenizer-of .*step-00000006"
    with pytest.raises(UserError, match=right):
        opened(trained, tmp_path / "other", job)
    _, _, corpus = opened(trained, write_tiny_dataset(tmp_path / "same"), job)
    assert corpus.total("samples", "heldout") > 0


def test_a_text_that_is_not_utf8_is_held_against_its_own_bytes(
    trained: Path, tmp_path: Path, job: Runtime
) -> None:
    """Replaced by U+FFFD, each byte would become the same three, which compress far better."""
    document = bytes(range(256)) * 2
    records = [RawSample("latin", (document,))]
    write_samples(records, tmp_path / "d", ByteTokenizer(), heldout=records)
    arguments, loaded, corpus = opened(trained, tmp_path / "d", job)
    # incomplete rows at the end have no labels
    text = _heldout_text(arguments, loaded, corpus)
    assert len(text) >= 256 and document.startswith(text)
    assert order0_bits_per_byte(text) > 7.9


def evaluate(trained: Path, job: Runtime, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    """The lines that the command prints."""
    arguments = build_parser().parse_intermixed_args([str(trained), *options])
    print_report(arguments, job)
    return capsys.readouterr().out.splitlines()


def test_diagnostics(trained: Path, job: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"

    def result(*options: str) -> dict[str, Any]:
        evaluate(trained, job, capsys, *options, "--output", str(output))
        return json.loads(output.read_text())

    plain, whole = result(), result("--by-position")
    assert plain["perplexity"] == pytest.approx(math.exp(plain["loss"]))
    assert plain["by_position"] == [] and whole["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert [part["first"] for part in whole["by_position"]] == [0]
    assert whole["by_position"][0]["bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=1e-6)
    rounds = result("--rounds", "1,2")["rounds"]
    assert list(rounds) == ["1", "2"] and 0 < rounds["1"]["loss"] != rounds["2"]["loss"]
    contexts = result("--context", "8,64")["context"]
    assert contexts["64"]["loss"] == pytest.approx(plain["loss"], rel=1e-6) != contexts["8"]["loss"]
    assert result("--without", "lsh")["loss"] != plain["loss"]
    needles = result("--needles", "100,128", "--rows", "2", "--plot", str(tmp_path / "needles.png"))
    assert needles["samples"] == 2 and len(needles["needles"]) == 10
    assert (tmp_path / "needles.png").is_file()
    assert 0 < result("--coverage", "--rows", "2")["mass"] <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--context", "8,65"), "--context 8,65: '65' must be from 1 to 64"),
        (("--context", "1k"), "'1k' must be from 1 to 64"),
        (("--context", "0"), "'0' must be"),
        (("--needles", "99"), "'99' must be from 100"),
        (("--needles", "x"), "--needles x: 'x' must be"),
        (("--needles", "129"), "'129' must be from 100 to 128"),
        (("--plot", "a.png"), "--plot a.png: needs --needles"),
        (("--by-position", "--rounds", "1"), "--by-position: "),
        (("--without", "exact"), "--without exact: .*0 local, 1 lsh"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    trained: Path, job: Runtime, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        evaluate(trained, job, capsys, *options)


def test_a_language_model_of_ids(tmp_path: Path, job: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids have no bytes, so its losses are in nats alone."""
    sequences = [RawSample(f"s{n}", (" ".join(str((n + i) % 9) for i in range(400)).encode(),)) for n in range(8)]
    write_samples(sequences, tmp_path / "ids", IdTokenizer(9), heldout=sequences[:1])
    run = tmp_path / "run"
    overrides = tiny_overrides(tmp_path / "ids", run, "trainer.max_steps=2")
    run_ranks("reformer_dist.train", 1, overrides, forked=True)
    lines = evaluate(run, job, capsys, "--by-position", "--output", str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["by_position"][0]["loss"] == pytest.approx(result["loss"]) and "bits_per_byte" not in result
    assert lines[-2:] == [
        "held-out loss by position in the row:",
        f"{'0-63':>16} {result['loss']:10.4f}  of {result['by_position'][0]['n_labels']:,} tokens",
    ]
