"""tools/make_shards.py and tools/inspect_shards.py."""

from __future__ import annotations

import gzip
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.datasets import damage_sample, make_sampler, open_loader, varied_documents
from support.forks import fork_ranks

from reformer_dist.data import ByteTokenizer, Corpus, Dataset, LoaderState, Replay, consumed_hash, write_dataset
from reformer_dist.process.exit_status import INTERRUPTED
from reformer_dist.run.compose import compose_run
from reformer_dist.run.data import QuarantineFile, TrainingData

TOOLS = Path(__file__).parents[2] / "tools"
PAGE = TOOLS.parent / "docs/data_order.md"


class Ended(NamedTuple):
    status: int
    output: str


def run(tool: str, *arguments: object) -> Ended:
    # more threads of tokenizers would only slow a small machine down
    return Ended(
        *fork_ranks(TOOLS / tool, 1, [str(word) for word in arguments], 180, {"TOKENIZERS_PARALLELISM": "false"})
    )


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with 60 Python files and one other file."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in varied_documents():
        (folder / f"{name}.py").write_bytes(text)
    (folder / "notes.md").write_text("not wanted")
    return folder


def test_tools_are_programs() -> None:
    for name in ("make_shards.py", "inspect_shards.py"):
        assert os.access(TOOLS / name, os.X_OK)
        assert (TOOLS / name).read_text().startswith("#!/usr/bin/env python3\n")


def test_folder_to_shards_and_back(texts: Path, tmp_path: Path) -> None:
    arguments = (texts, "--suffix", ".py", "--output", tmp_path / "d", "--shard-mb", 0.01, "--heldout", 0.2)
    made = run("make_shards.py", *arguments)
    assert made.status == 0, made.output
    dataset = Dataset.open(tmp_path / "d")
    assert dataset.total("samples", "train") + dataset.total("samples", "heldout") == 60
    assert f"{dataset.total('text_bytes', 'train'):,} bytes" in made.output
    assert f"{dataset.total('tokens', 'heldout'):,} tokens" in made.output
    assert "held out:" in made.output

    shown = run("inspect_shards.py", tmp_path / "d", "--samples", 1, "--verify")
    assert shown.status == 0, shown.output
    assert "texts/doc" in shown.output
    assert "match their checksums" in shown.output

    again = run("make_shards.py", *arguments)
    assert (again.status, "--overwrite" in again.output) == (1, True)
    assert run("make_shards.py", *arguments, "--overwrite").status == 0


def test_bpe_from_jsonl_gz_and_a_given_tokenizer(tmp_path: Path) -> None:
    lines = [json.dumps({"body": text.decode()}) for _, text in varied_documents()]
    source = tmp_path / "d.jsonl.gz"
    source.write_bytes(gzip.compress("\n".join(lines).encode()))
    common = (source, "--text-field", "body", "--tokenizer", "bpe", "--heldout", 0.2)
    made = run("make_shards.py", *common, "--vocab-size", 300, "--output", tmp_path / "a")
    assert made.status == 0, made.output
    dataset = Dataset.open(tmp_path / "a")
    assert dataset.tokenizer.vocab_size == 300
    assert dataset.total("text_bytes", "train") + dataset.total("text_bytes", "heldout") == sum(
        len(t) for _, t in varied_documents()
    )
    assert dataset.total("tokens", "train") < dataset.total("text_bytes", "train")

    tokenizer_file = tmp_path / "a" / "tokenizer.json"
    made = run("make_shards.py", *common, "--tokenizer-file", tokenizer_file, "--output", tmp_path / "b")
    assert made.status == 0, made.output
    assert Dataset.open(tmp_path / "b").fingerprint == dataset.fingerprint


def test_skipped_files_are_counted_once(texts: Path, tmp_path: Path) -> None:
    """Although training a tokenizer reads the text twice."""
    (texts / "wide.txt").write_bytes("wide".encode("utf-16-le"))
    learn = ("--tokenizer", "bpe", "--vocab-size", 300, "--heldout", 0.2)
    made = run("make_shards.py", texts, *learn, "--output", tmp_path / "d")
    assert made.status == 0, made.output
    assert "skipped: 1 binary file" in made.output


def test_verify_names_the_bad_shard(texts: Path, tmp_path: Path) -> None:
    assert run("make_shards.py", texts, "--output", tmp_path / "d", "--heldout", 0.2).status == 0
    path = tmp_path / "d" / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[515] ^= 1
    path.write_bytes(content)
    shown = run("inspect_shards.py", tmp_path / "d", "--verify")
    assert shown.status == 1
    assert "train-000000.tar: shard" in shown.output
    assert "train-000000.tar: sample 00000000" in shown.output


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("make_shards.py", ["nowhere", "--output", "out"], "nowhere"),
        ("make_shards.py", ["empty.txt", "--output", "out"], "no text"),
        ("make_shards.py", ["short.txt", "--output", "out"], "held out"),
        ("make_shards.py", ["bad.jsonl", "--output", "out"], "bad.jsonl:1"),
        (
            "make_shards.py",
            ["short.txt", "--output", "out", "--tokenizer", "bpe", "--vocab-size", "9"],
            "vocab_size=9",
        ),
        ("inspect_shards.py", ["nowhere"], "reformer-shards"),
    ],
)
def test_user_errors_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tool: str,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    for name, content in {"empty.txt": "", "short.txt": "x", "bad.jsonl": "{"}.items():
        Path(name).write_text(content)
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(TOOLS / tool), run_name="__main__")
    assert ending.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: " if tool == "make_shards.py" else f"{tool}: error: ")
    assert message in line


@pytest.mark.jobs
def test_an_error_of_a_program_is_one_line(tmp_path: Path) -> None:
    result = run("make_shards.py", tmp_path / "nowhere", "--output", tmp_path / "d", "--vocab-size", 300)
    assert (result.status, "--tokenizer bpe" in result.output) == (2, True)
    command = [sys.executable, TOOLS / "make_shards.py", tmp_path / "nowhere", "--output", tmp_path / "d"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a configuration, and a dataset with some damaged samples."""
    root = tmp_path_factory.mktemp("order")
    write_dataset(varied_documents(), root / "data", ByteTokenizer(), 12_000, 0.2)
    for number in range(5, 40, 5):
        damage_sample(Dataset.open(root / "data"), number)
    (root / "run").mkdir()
    settings = {"path": str(root / "data"), "seq_len": 64, "batch_size": 8}
    (root / "run" / "config.yaml").write_text(json.dumps({"data": settings, "trainer": {"seed": 3}}))
    return root / "run"


def inspect(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["inspect_shards.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(TOOLS / "inspect_shards.py"), run_name="__main__")
    assert ending.value.code == 0


def test_the_samples_of_a_step(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The samples that the loader reads, from a run directory or from a dataset and overrides."""
    data = run_folder.parent / "data"
    corpus = Corpus.open([data])
    with open_loader(corpus, batch_size=8) as loader:
        batches = [next(loader) for _ in range(20)]
        state = batches[-1].state
    found = [damage for batch in batches for damage in batch.damaged]
    assert found
    QuarantineFile(run_folder).add(found)
    inspect(monkeypatch, run_folder, "--order", 20, "--hash")
    shown = capsys.readouterr().out
    assert f"hash of all samples so far: {consumed_hash(state)}" in shown
    inspect(monkeypatch, run_folder, "--order", 20)
    listed = capsys.readouterr().out.splitlines()
    assert listed == shown.splitlines()[:-1]
    assert (
        listed.pop(0)
        == "order of seed=3, batch_size=8, seq_len=64, shuffle=True, interleaved_shards=2, weights=None"
    )
    # the text of each row is that of the listed spans
    texts = dict(varied_documents())
    rows: list[bytes] = []
    for line in listed:
        if line.startswith("step 20, row"):
            rows.append(b"")
        else:
            document, start, stop = re.fullmatch(r".*\((\w+)\), tokens (\d+) to (\d+) of \d+", line).groups()
            rows[-1] += (texts[document] + b"\xff")[int(start) : int(stop)]
    labels = torch.cat([rows["labels"] for rows in batches[-1].batches]).clamp(max=255)
    assert rows == [bytes(row.tolist()) for row in labels]

    (run_folder / "quarantine.jsonl").unlink()
    inspect(monkeypatch, data, "--order", 3, "data.seq_len=64", "data.batch_size=8", "trainer.seed=3")
    assert "\nstep 3, row 0:\n" in capsys.readouterr().out


def test_the_order_in_the_docs_is_that_of_training(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command of docs/data_order.md for a run that has not begun, and the samples that this run would read."""
    [line] = [line for line in PAGE.read_text().splitlines() if "--order 7" in line]
    overrides = line.split("#")[0].split()[5:]
    data = str(run_folder.parent / "data")
    inspect(monkeypatch, data, "--order", 7, *overrides)
    _, *listed = capsys.readouterr().out.splitlines()
    config = compose_run([*overrides, "experiment=quickstart", f"data.path={data}"])
    training = TrainingData.open(config, Corpus.open([data]), None)
    replay = Replay(training.sampler, training.state)
    for _ in range(7):
        rows = replay.next_step()
    expected = [f"tokens {span.start} to {span.stop} of {span.ref.entry.n_tokens}" for row in rows for span in row]
    assert [words.split("), ")[1] for words in listed if not words.startswith("step 7, row")] == expected


def test_a_distant_step_is_found_at_once(tmp_path: Path) -> None:
    """Skipping steps ends where iterating over them does, for one dataset and for a mixture."""
    write_dataset(varied_documents(), tmp_path / "data", ByteTokenizer(), 12_000, 0.2)
    dataset = Dataset.open(tmp_path / "data")
    for corpus in (Corpus([dataset, dataset], [1.0, 2.0]), Corpus([dataset])):
        sampler = make_sampler(corpus)
        skipped, walked = Replay(sampler, LoaderState()), Replay(sampler, LoaderState())
        skipped.skip(50)
        for _ in range(50):
            walked.next_step()
        ids = [[[span.id for span in row] for row in each.next_step()] for each in (skipped, walked)]
        assert ids[0] == ids[1]
    skipped.skip(10**12)
    assert all(skipped.next_step())


def test_a_failure_removes_created_folders(tmp_path: Path) -> None:
    empty, there = tmp_path / "empty.txt", tmp_path / "there"
    empty.touch()
    there.mkdir()
    for output in (tmp_path / "new/data", there):
        failed = run("make_shards.py", empty, "--output", output)
        assert (failed.status, "no text" in failed.output) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "there"]


@pytest.mark.jobs
def test_an_interrupt_removes_created_folders(tmp_path: Path) -> None:
    source, output = tmp_path / "d.jsonl", tmp_path / "new/data"
    source.write_text("".join(f'{{"text": "line {number}"}}\n' for number in range(200_000)))
    command = [sys.executable, TOOLS / "make_shards.py", source, "--output", output]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not output.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == INTERRUPTED
    assert list(tmp_path.iterdir()) == [source]
