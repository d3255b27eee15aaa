"""Labels at chosen tokens: spans of text become spans of tokens, and only these are predicted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import tiny_config
from torch import nn

from reformer_dist.data import (
    IGNORE_INDEX,
    BpeTokenizer,
    ByteTokenizer,
    Corpus,
    Dataset,
    DrawKey,
    IdTokenizer,
    RawSample,
    RowSelection,
    Sample,
    label_mask,
    load_tokenizer,
    read_groups,
    write_samples,
)
from reformer_dist.data.format.label_spans import token_spans
from reformer_dist.errors import DataError
from reformer_dist.tasks import Task, make_task

TEXT = "Frage: wie groß?\nAntwort: 3 m.\n".encode()
ANSWER = (TEXT.index(b"3"), TEXT.index(b"3") + 3)


def task_of(kind: str, data: Path, seq_len: int = 64) -> Task:
    config = tiny_config(data, data.parent / "run", f"task.kind={kind}", f"data.seq_len={seq_len}")
    return make_task(config, Dataset.open(data).tokenizer)


@pytest.fixture
def labeled(tmp_path: Path) -> Path:
    samples = [RawSample(f"t{n}", (TEXT,), label_spans=(ANSWER,), label_groups=("length",)) for n in range(4)]
    write_samples(samples[1:], tmp_path / "data", ByteTokenizer(), heldout=samples[:1], label_spans=True)
    return tmp_path / "data"


def test_only_the_spans_are_labels(labeled: Path) -> None:
    task = task_of("completion", labeled)
    corpus = Corpus.open([labeled])
    task.check(corpus)
    [batch] = task.heldout(corpus, RowSelection(split="heldout"))
    row = [256, *TEXT][: len(TEXT) + 1]
    assert batch["tokens"][0].tolist()[: len(row)] == row
    expected = [byte if ANSWER[0] <= i < ANSWER[1] else IGNORE_INDEX for i, byte in enumerate([*TEXT, 256])]
    assert batch["labels"][0].tolist()[: len(expected)] == expected


def test_a_sample_without_spans_is_all_label() -> None:
    assert label_mask({}, 5, "here").tolist() == [True] * 5
    assert label_mask({"label_spans": [[1, 2], [4, 5]]}, 5, "here").tolist() == [False, True, False, False, True]


@given(st.data())
def test_a_bpe_token_is_a_label_if_any_of_its_bytes_is(data: st.DataObject) -> None:
    tokenizer = BPE
    text = data.draw(st.text("abcü 中\n", min_size=1, max_size=30)).encode()
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start + 1, len(text)))
    ids = tokenizer.encode(text)
    [[first, end]] = token_spans([(start, stop)], ids, tokenizer, "here")
    places = np.repeat(np.arange(len(ids)), tokenizer.token_bytes[ids])  # token of each byte
    assert sorted(set(places[start:stop].tolist())) == list(range(first, end))


BPE = BpeTokenizer.train([b"aa ab abc cab aab \xc3\xbc\xc3\xbc"] * 3, 270)


@pytest.mark.parametrize("spans", [[(3, 3)], [(-1, 2)], [(0, 32)], [(4, 6), (5, 7)], [(4, 6), (1, 2)]])
def test_spans_beyond_the_text_or_out_of_order_are_refused(spans: list[tuple[int, int]]) -> None:
    with pytest.raises(DataError, match=r"here: label span \["):
        token_spans(spans, np.zeros(31, np.uint8), ByteTokenizer(), "here")


@pytest.mark.parametrize("spans", ["x", [[1]], [[2, 1]], [[0, 9]], [[0, 1.5]], [[True, 2]]])
def test_altered_spans_are_refused(spans: object) -> None:
    with pytest.raises(DataError, match="here: label_spans"):
        label_mask({"label_spans": spans}, 5, "here")
    with pytest.raises(DataError, match="here: label_groups"):
        read_groups({"label_groups": spans}, 3, "here")


def test_the_accuracy_of_each_group_is_measured(tmp_path: Path) -> None:
    """A model that predicts the next number is right about ascending ids, and wrong about others."""

    class NextNumber(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(()))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot((tokens + 1) % 10, 10).float()

    texts = {"1 2 3 4 5": ("up", "up"), "1 2 3 5 4": ("down", "up"), "7": (), "0 0 0 0 0": ("no", "no")}
    samples = [
        RawSample(text, (text.encode(),), label_spans=((4, 5), (1, 3))[: len(groups)][::-1], label_groups=groups)
        for text, groups in texts.items()
    ]
    write_samples(samples, tmp_path / "data", IdTokenizer(9), heldout=samples, label_spans=True)
    for seq_len, up in ((8, "66.67 % of 3"), (4, "33.33 % of 3")):  # a span beyond the row is wrong
        task = task_of("completion", tmp_path / "data", seq_len)
        rows = RowSelection(micro_batch_size=3, split="heldout")
        metrics = task.measure(NextNumber(), Corpus.open([tmp_path / "data"]), rows, lambda local: local)
        assert metrics.lines == ["down: 100.00 % of 1", "no: 0.00 % of 2", f"up: {up}"]


@pytest.mark.parametrize("kind", ["language_model", "masked_language_model", "sequence_classification"])
def test_other_tasks_refuse_them(labeled: Path, kind: str) -> None:
    causal = ["model.causal=false"] * (kind != "language_model")
    config = tiny_config(labeled, labeled.parent / "run", f"task.kind={kind}", *causal)
    with pytest.raises(DataError, match=f"task.kind={kind}"):
        make_task(config, ByteTokenizer(), ["a"]).check(Corpus.open([labeled]))


def test_a_completion_of_unmarked_text_is_refused(tmp_path: Path) -> None:
    samples = [RawSample(f"t{n}", (TEXT,)) for n in range(2)]
    write_samples(samples[1:], tmp_path / "data", ByteTokenizer(), heldout=samples[:1])
    with pytest.raises(DataError, match=r"task\.kind=completion needs prompt and completion"):
        task_of("completion", tmp_path / "data").check(Corpus.open([tmp_path / "data"]))


def test_rows_that_are_too_short_lose_the_end(labeled: Path) -> None:
    example = task_of("completion", labeled, seq_len=16).encode(
        Sample("s", (np.frombuffer(TEXT, np.uint8),), {"label_spans": [[2, 4], [15, 18]]}), DrawKey.heldout(0)
    )
    assert example["tokens"].tolist() == [256, *TEXT[:15]]
    assert np.flatnonzero(example["labels"] != IGNORE_INDEX).tolist() == [2, 3, 15]


def test_ids(tmp_path: Path) -> None:
    tokenizer = IdTokenizer(70_000)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.dtype) == (70_001, 70_000, "uint32")
    assert tokenizer.encode(b" 12 0\n69999").tolist() == [12, 0, 69_999]
    assert tokenizer.decode([12, 0, 70_000, 69_999]) == "12 0 69999"
    assert token_spans([(1, 3)], tokenizer.encode(b"5 6 7"), tokenizer, "here") == [[1, 3]]
    for wrong in (b"1 70000", b"1 -2", b"1.5", b"x"):
        with pytest.raises(DataError, match=r"token id .*: must be an integer"):
            tokenizer.encode(wrong)
    with pytest.raises(DataError, match="n_ids=0"):
        IdTokenizer(0)
    loaded = load_tokenizer(tokenizer.save(tmp_path), tmp_path)
    assert isinstance(loaded, IdTokenizer) and loaded.vocab_size == 70_001


def test_losses_of_ids_are_not_in_bits_per_byte(tmp_path: Path) -> None:
    samples = [RawSample(f"t{n}", (b"1 2 3",), label_spans=((1, 2),)) for n in range(2)]
    write_samples(samples[1:], tmp_path / "data", IdTokenizer(9), heldout=samples[:1], label_spans=True)
    assert task_of("completion", tmp_path / "data").token_bytes is None
