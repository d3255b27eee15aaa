"""Question answering: windows cover the context, labels mark the answer, and the best span is found."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pieces import train_pieces
from task_data import make, write_for
from torch import nn

from reformer_dist.data import (
    BpeTokenizer,
    ByteTokenizer,
    Corpus,
    DrawKey,
    RawSample,
    RowSelection,
    Sample,
    write_samples,
)
from reformer_dist.errors import ConfigError, DataError
from reformer_dist.tasks.question_answering import ContextWindow, QuestionAnswering, TokenSpan

CONTEXT = "Über den Rhein führen viele Brücken, und die älteste von ihnen steht seit 1850 in Waldshut. " * 3
ANSWER = "1850"
START = len(CONTEXT.encode()) - len("1850 in Waldshut. ")


class Pointer(nn.Module):
    """A stand-in for a trained model that points at the first and last byte of the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: torch.Tensor, **other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        windows = tokens.unfold(1, 4, 1) == torch.tensor(list(ANSWER.encode()))
        first = torch.zeros(tokens.shape)
        first[:, :-3] = windows.all(-1).float() * 5
        return first, first.roll(3, dims=1)


def task_and_sample(*changed: str, seq_len: int = 64) -> tuple[QuestionAnswering, Sample]:
    task = make(
        "question_answering",
        Path("unused"),
        "model.causal=false",
        f"data.seq_len={seq_len}",
        "task.stride=16",
        *changed,
    )
    assert isinstance(task, QuestionAnswering)
    fields = tuple(task.tokenizer.encode(text.encode()) for text in ("Since when?", CONTEXT))
    return task, Sample("q", fields, {"answers": [[START, ANSWER]]})


@pytest.mark.parametrize("stride", [0, 16, 61])
def test_windows_cover_the_context_and_labels_point_at_the_answer(stride: int) -> None:
    task, sample = task_and_sample(f"task.stride={stride}")
    windows = task._windows(sample)
    covered = set()
    for window in windows:
        assert len(window.tokens) <= 64
        inside = window.tokens[window.context_offset : -1]
        assert np.array_equal(inside, sample.fields[1][window.start : window.start + len(inside)])
        covered |= set(range(window.start, window.start + len(inside)))
    assert covered == set(range(len(sample.fields[1])))

    with_answer = 0
    for place in range(60):
        row = task.encode(sample, DrawKey(0, 0, place))
        first, last = row["labels"]
        if first == len(row["tokens"]) - 1:
            assert last == first
        else:
            with_answer += 1
            assert bytes(row["tokens"][first : last + 1].astype(np.uint8)) == ANSWER.encode()
            assert row["answer_mask"][first : last + 1].all()
        assert np.array_equal(row["tokens"], task.encode(sample, DrawKey(0, 0, place))["tokens"])
    assert 30 <= with_answer < 60


def test_a_long_question_does_not_multiply_windows() -> None:
    """It leaves 32 tokens of a row, equal to the stride: windows then share half of that."""
    task, _ = task_and_sample("task.stride=32")
    sample = Sample("q", (np.zeros(99, np.int64), np.arange(5000)), {})
    starts = [window.start for window in task._windows(sample)]
    assert starts == list(range(0, 5000 - 16, 16))
    # a stride that fits is respected
    sample = Sample("q", (np.zeros(2, np.int64), np.arange(500)), {})
    windows = task._windows(sample)
    assert all(before.end - after.start == 60 // 2 for before, after in pairwise(windows))
    task, _ = task_and_sample("task.stride=7")
    assert all(before.end - after.start == 7 for before, after in pairwise(task._windows(sample)))


@pytest.mark.parametrize(("stride", "seq_len"), [(62, 64), (128, 64), (0, 2)])
def test_a_stride_longer_than_a_window_is_refused(stride: int, seq_len: int, tmp_path: Path) -> None:
    task, _ = task_and_sample(f"task.stride={stride}", seq_len=seq_len)
    corpus = Corpus.open([write_for("question_answering", tmp_path / "d")])
    words = rf"task\.stride={stride}: .*\b{seq_len - 2}\b.* data\.seq_len={seq_len}\b"
    with pytest.raises(ConfigError, match=words):
        task.check(corpus)


def test_labels_of_bpe_cover_the_answer() -> None:
    task, _ = task_and_sample(seq_len=128)
    task.tokenizer = tokenizer = BpeTokenizer.train([CONTEXT.encode()] * 3, 300)
    fields = tuple(tokenizer.encode(text.encode()) for text in ("Since when?", CONTEXT))
    row = task.encode(Sample("q", fields, {"answers": [[START, ANSWER]]}), DrawKey(0, 0, 1))
    first, last = row["labels"]
    assert ANSWER in tokenizer.decode(row["tokens"][first : last + 1])
    assert last - first < 4


def test_data_whose_vocabulary_moves_answers_are_refused(tmp_path: Path) -> None:
    task, _ = task_and_sample()
    pieces = train_pieces(tmp_path, [CONTEXT] * 9)
    records = [RawSample("q", (b"Since when?", CONTEXT.encode()), {"answers": [[START, ANSWER]]})]
    for tokenizer in (ByteTokenizer(), pieces):
        write_samples(
            records, tmp_path / "d", tokenizer, heldout_fraction=0, overwrite=True, fields=task.field_names
        )
        task.tokenizer, corpus = tokenizer, Corpus.open([tmp_path / "d"])
        if tokenizer is pieces:
            with pytest.raises(DataError, match=r"reformer-shards --squad FILE\.json --tokenizer"):
                task.check(corpus)
        else:
            task.check(corpus)


@pytest.mark.parametrize("most", [1, 3, 5, 40])
@pytest.mark.parametrize("n_context", [0, 1, 2, 17])
def test_the_best_span_is_that_of_all_pairs(most: int, n_context: int) -> None:
    """Ties are broken by the first start, then the first end."""
    task, _ = task_and_sample(f"task.max_answer_tokens={most}")
    window = ContextWindow(np.zeros(3 + n_context + 1, np.int64), context_offset=3, start=100)
    draw = torch.Generator().manual_seed(most)
    for _ in range(50):
        starts, ends = torch.randint(-2, 3, (2, len(window.tokens)), generator=draw).float()
        best = (-float("inf"), (0, -1))
        for first in range(n_context):
            for last in range(first, min(n_context, first + most)):
                score = float(starts[3 + first] + ends[3 + last] - starts[-1] - ends[-1])
                if score > best[0]:
                    best = (score, (100 + first, 100 + last))
        assert task._best_of_window(window, starts, ends) == TokenSpan(best[1][0], best[1][1] + 1, best[0])


def test_memory_is_linear_in_the_window() -> None:
    task, _ = task_and_sample()
    window = ContextWindow(np.zeros(2**20, np.int64), 10, 0)
    starts = torch.zeros(2**20)
    starts[70_000] = 1
    # a table of all pairs would take 4 TiB
    found = task._best_of_window(window, starts, starts.roll(5))
    assert (found.first, found.stop) == (69_990, 69_996)


def test_the_best_span_of_all_windows_is_measured(tmp_path: Path) -> None:
    task, _ = task_and_sample("task.stride=16", "task.max_answer_tokens=4")
    fields = (b"Since when?", CONTEXT.encode())
    records = [RawSample(f"q{n}", fields, {"answers": [[START, ANSWER], [START, "1850 in"]]}) for n in range(3)]
    records.append(RawSample("q3", fields, {"answers": [[0, "Über"]]}))
    write_samples(records, tmp_path / "d", ByteTokenizer(), heldout=records, fields=("question", "context"))
    metrics = task.measure(Pointer(), Corpus.open([tmp_path / "d"]), RowSelection(0, 2), lambda mine: mine)
    assert metrics.lines == ["questions: 4", "exact match: 75.00", "F1: 75.00"]
    assert metrics.values == {"exact_match": 75, "f1": 75}
