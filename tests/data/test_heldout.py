"""Held-out text: each token is predicted once, and no rank waits for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.datasets import damage_sample, documents_of, folder_of, numbered_text, replace_split

from reformer_dist.data import (
    IGNORE_INDEX,
    Batch,
    BpeTokenizer,
    Corpus,
    DamagedSample,
    Dataset,
    RowSelection,
    SampleReader,
    SampleRef,
    count_text_bytes,
    heldout_text_batches,
    read_split,
)
from reformer_dist.errors import DataError


def read(
    dataset: Dataset,
    seq_len: int = 50,
    report: Callable[[DamagedSample], None] = lambda sample: None,
    **changed: Any,
) -> list[Batch]:
    rows = RowSelection(**({"micro_batch_size": 3} | changed))
    return list(heldout_text_batches(Corpus([dataset]), rows, seq_len=seq_len, report=report))


def all_tokens(dataset: Dataset) -> list[int]:
    return [int(token) for document in documents_of(dataset, "heldout") for token in document]


def labels_in_order(ranks: list[list[Batch]]) -> list[int]:
    """Labels of rows 0, 1, 2, ... where row i is on rank i % dp_size."""
    by_rank = [torch.cat([batch["labels"] for batch in batches]) for batches in ranks]
    rows = torch.stack(by_rank, dim=1).flatten(0, 1)
    return rows[rows != IGNORE_INDEX].tolist()


@settings(max_examples=40, deadline=None)
@given(seq_len=st.integers(1, 5000), dp_size=st.integers(1, 5), micro_batch_size=st.integers(1, 5))
def test_each_token_is_predicted_once(dataset: Dataset, seq_len: int, dp_size: int, micro_batch_size: int) -> None:
    changed = {"seq_len": seq_len, "micro_batch_size": micro_batch_size, "dp_size": dp_size}
    ranks = [read(dataset, dp_rank=rank, **changed) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert labels_in_order(ranks) == all_tokens(dataset)
    for batch in (batch for batches in ranks for batch in batches):
        tokens, labels = batch["tokens"], batch["labels"]
        assert tokens.shape == labels.shape == (micro_batch_size, seq_len)
        kept = labels != IGNORE_INDEX
        assert torch.equal(tokens[:, 1:][kept[:, :-1]], labels[:, :-1][kept[:, :-1]])
        assert (tokens[:, 1:][~kept[:, :-1]] == dataset.tokenizer.eos_id).all()


def test_inputs_are_the_tokens_before_the_labels(dataset: Dataset) -> None:
    batches = read(dataset, micro_batch_size=1)
    inputs = torch.cat([batch["tokens"][batch["labels"] != IGNORE_INDEX] for batch in batches])
    assert inputs.tolist() == [256, *all_tokens(dataset)[:-1]]


@pytest.mark.parametrize(("rows", "dp_size"), [(1, 1), (5, 1), (5, 2), (7, 4), (2, 4), (10_000, 3)])
def test_rows_are_spread_evenly_for_any_number_of_ranks(dataset: Dataset, rows: int, dp_size: int) -> None:
    ranks = [read(dataset, max_rows=rows, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    text = all_tokens(dataset)
    available = -(-len(text) // 50)
    n_rows = min(rows, available)
    assert {len(batches) for batches in ranks} == {-(-n_rows // (3 * dp_size))}
    numbers = [available * i // n_rows for i in range(n_rows)]
    assert labels_in_order(ranks) == [token for row in numbers for token in text[row * 50 : row * 50 + 50]]
    distances = set(np.diff([*numbers, available]).tolist())
    assert max(distances) - min(distances) <= 1
    assert RowSelection(max_rows=rows).describe(54_929) == f"{rows:,} of 54,929 rows"


def test_every_source_is_judged(make_dataset: Callable[..., Dataset]) -> None:
    """Text and samples in the order of their sources, 64 rows of many."""
    folder = folder_of(make_dataset())
    replace_split(folder, "heldout", [source * 40 for source in (b"a", b"b", b"c", b"d") for _ in range(100)])
    dataset = Dataset.open(folder)
    text = torch.cat([batch["labels"].flatten() for batch in read(dataset, seq_len=41, max_rows=64)])
    samples = [sample.fields[0] for sample in read_split(Corpus([dataset]), RowSelection(max_rows=64))]
    for tokens in (text, torch.tensor(np.concatenate(samples).astype(np.int64))):
        counts = torch.bincount(tokens[tokens != IGNORE_INDEX], minlength=257)[97:101]
        assert counts.tolist() == [16 * 40] * 4


def test_few_rows_of_a_large_split_read_few_samples(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[SampleRef] = []
    read_sample = SampleReader.read
    monkeypatch.setattr(SampleReader, "read", lambda self, ref: opened.append(ref) or read_sample(self, ref))
    read(dataset, seq_len=2, max_rows=3)
    assert 0 < len(opened) <= 6 < dataset.total("samples", "heldout")


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_text_bytes_are_those_of_the_split(make_dataset: Callable[..., Dataset], kind: str) -> None:
    changed = {"tokenizer": BpeTokenizer.train([numbered_text(1, 5000)], 290)} if kind == "bpe" else {}
    dataset = make_dataset(**changed)
    token_bytes = dataset.tokenizer.token_bytes
    counted = sum(count_text_bytes(batch["labels"], token_bytes) for batch in read(dataset))
    assert counted == dataset.total("text_bytes", "heldout")


def test_empty_documents(make_dataset: Callable[..., Dataset]) -> None:
    folder = folder_of(make_dataset())
    replace_split(folder, "heldout", [b"", b"ab", b"", b""])
    assert labels_in_order([read(Dataset.open(folder), seq_len=2)]) == [256, 97, 98, 256, 256, 256]


def test_an_empty_heldout_split_is_an_immediate_error(make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset(heldout_fraction=0.0)
    with pytest.raises(DataError, match="--heldout"):
        heldout_text_batches(Corpus([dataset]), RowSelection(), seq_len=8)


def test_damaged_documents_are_skipped_and_named(make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset()
    text = documents_of(dataset, "heldout")
    damage_sample(dataset, 1, "heldout")
    found: list[DamagedSample] = []
    ranks = [
        read(dataset, max_damaged_fraction=0.2, report=found.append, dp_rank=rank, dp_size=2) for rank in range(2)
    ]
    assert len(ranks[0]) == len(ranks[1])
    assert labels_in_order(ranks) == np.concatenate([text[0], *text[2:]]).tolist()
    assert len(found) == 2 and found[0] == found[1]
    assert "heldout-000000.tar: sample 00000001" in str(found[0])
    with pytest.raises(DataError, match=r"heldout-000000\.tar: sample 00000001 .*max_damaged_\w+=0\b"):
        read(dataset)
