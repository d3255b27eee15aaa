"""Generation of sequence-to-sequence models equals the whole forward, in any batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from task_data import make, write_pairs

from reformer_dist.data import ByteTokenizer, Corpus, DrawKey, RowSelection, Sample, collate, read_split
from reformer_dist.tasks.sequence_to_sequence import SequenceToSequence

SIZES = ("task.max_source_len=40", "data.seq_len=24", "model.dropout=0")


def make_task(*changed: str) -> SequenceToSequence:
    task = make("sequence_to_sequence", Path("unused"), *SIZES, *changed)
    assert isinstance(task, SequenceToSequence)
    return task


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data")


def test_a_row_is_source_and_shifted_target() -> None:
    task = make_task("task.max_source_len=4", "data.seq_len=3")
    row = task.encode(Sample("", (np.arange(1, 7), np.arange(11, 15))), DrawKey(0, 0, 0))
    assert row["source"].tolist() == [1, 2, 3, 256]
    assert row["tokens"].tolist() == [256, 11, 12]
    assert row["labels"].tolist() == [11, 12, 13]
    row = task.encode(Sample("", (np.arange(1, 3), np.arange(11, 13))), DrawKey(0, 0, 0))
    assert (row["source"].tolist(), row["labels"].tolist()) == ([1, 2, 256], [11, 12, 256])
    batch = collate([row, task.encode(Sample("", (np.arange(1, 2), np.arange(11, 12))), DrawKey(0, 0, 0))])
    assert batch["source_mask"].sum(1).tolist() == [3, 2]
    assert batch["labels"][1].tolist() == [11, 256] + [-100] * 6


def test_generation_equals_argmax_of_the_whole_forward(data: Path) -> None:
    task = make_task()
    model = task.build_model().eval()
    with torch.no_grad():  # an end-of-text token now and then
        model.head.weight *= 30
        model.head.bias[256] += 6.0
    samples = list(read_split(Corpus.open([data]), RowSelection()))
    written = task.generate(model, samples)
    assert len(set(map(len, written))) > 1
    for sample, text in zip(samples, written, strict=True):
        assert task.generate(model, [sample]) == [text]  # other rows and padding change nothing
        assert text == _plainly(task, model, sample)


@torch.no_grad()
def _plainly(task: SequenceToSequence, model: torch.nn.Module, sample: Sample) -> str:
    tokens = [256]
    source = torch.tensor(task.encode(sample, DrawKey(0, 0, 0))["source"])[None]
    while len(tokens) <= 24 and (len(tokens) == 1 or tokens[-1] != 256):
        tokens.append(int(model(source, torch.tensor([tokens]))[0, -1].argmax()))
    return ByteTokenizer().decode(tokens).strip()


def test_beam_search_is_at_least_as_likely_as_greedy(data: Path) -> None:
    greedy, search = make_task(), make_task("task.beams=3")
    model = greedy.build_model().eval()
    [sample, *_] = read_split(Corpus.open([data]), RowSelection())
    found, plain = search.generate(model, [sample]), greedy.generate(model, [sample])
    assert len(found) == len(plain) == 1


@pytest.mark.parametrize(("metric", "words"), [("bleu", "sacreBLEU: "), ("rouge", "ROUGE-L: ")])
def test_measures(data: Path, metric: str, words: str) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    task = make_task(f"task.metric={metric}")
    metrics = task.measure(task.build_model().eval(), Corpus.open([data]), RowSelection(3, 2), lambda mine: mine)
    lines = metrics.lines
    assert lines[0] == "samples: 3"
    assert set(metrics.values) == ({"bleu"} if metric == "bleu" else {"rouge_1", "rouge_2", "rouge_l"})
    assert any(line.startswith(words) for line in lines)
    assert sum(line.startswith("  written: ") for line in lines) == 3
