"""All ranks skip the same damaged samples, also after a resume; too many, and changed data, are refused."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.datasets import (
    damage_sample,
    documents_of,
    folder_of,
    make_sampler,
    open_loader,
    read_steps,
    read_world,
    replace_split,
    varied_documents,
)

from reformer_dist.data import (
    ByteTokenizer,
    Corpus,
    Dataset,
    Quarantine,
    SampleRef,
    describe_changes,
    read_state,
    write_dataset,
)
from reformer_dist.data.format.quarantine import CheckedReader
from reformer_dist.errors import DataError


@pytest.fixture
def copy(dataset: Dataset, tmp_path: Path) -> Dataset:
    shutil.copytree(folder_of(dataset), tmp_path / "copy")
    return Dataset.open(tmp_path / "copy")


def texts(rows: torch.Tensor) -> list[bytes]:
    """The documents in the labels of one stream."""
    labels = [token for token in rows[:, 1].flatten().tolist() if token >= 0]
    return bytes(min(token, 255) for token in labels).split(b"\xff")[:-1]


def test_a_damaged_sample_is_skipped_and_named(copy: Dataset) -> None:
    whole = [bytes(tokens[:-1].astype("uint8")) for tokens in documents_of(copy)]
    ids = [damage_sample(copy, number) for number in (0, 5, 6)]
    changed: dict[str, Any] = {"batch_size": 1, "shuffle": False, "passes": 1}
    n_steps = make_sampler(copy, batch_size=1).last_step(1)
    batches, state = read_steps(copy, n_steps, **changed)
    found = [damage for batch in batches for damage in batch.damaged]
    assert [damage.id for damage in found] == ids
    assert state["quarantine"] == [list(name) for name in ids]
    assert f"{ids[1][1]}: sample {ids[1][2]} (" in str(found[1]) and "sha256 differs" in str(found[1])
    rows, _ = read_world(copy, n_steps, **changed)
    assert texts(rows) == [text for number, text in enumerate(whole) if number not in (0, 5, 6)]


@pytest.mark.parametrize(("dp_size", "workers"), [(1, 3), (2, 0), (4, 1)])
def test_every_world_skips_the_same_samples(copy: Dataset, dp_size: int, workers: int) -> None:
    """At the same steps: the state after each step is the same."""
    for number in (3, 4, 11, 30, 31):
        damage_sample(copy, number)
    for n_steps in (1, 3, 9, 40):
        rows, state = read_world(copy, n_steps, dp_size, workers=workers)
        expected, expected_state = read_world(copy, n_steps)
        assert torch.equal(rows, expected)
        assert state == expected_state
    assert len(expected_state["quarantine"]) == 5


def test_a_repaired_sample_stays_in_quarantine(dataset: Dataset, copy: Dataset) -> None:
    for number in (3, 11, 30):
        damage_sample(copy, number)
    changed: dict[str, Any] = {"batch_size": 2}
    n_steps = make_sampler(copy, **changed).last_step(1)
    expected, _ = read_world(copy, 2 * n_steps, **changed)
    _, state = read_world(copy, n_steps, **changed)
    assert len(state["quarantine"]) == 3
    shutil.copytree(folder_of(dataset), folder_of(copy), dirs_exist_ok=True)
    after, end = read_world(Dataset.open(folder_of(copy)), n_steps, state=state, **changed)
    assert torch.equal(after, expected[n_steps:])
    assert end["quarantine"] == state["quarantine"]


def test_damaged_samples_of_other_ranks_are_quarantined(copy: Dataset) -> None:
    damage_sample(copy, 0)
    [finder], _ = read_steps(copy, 1, batch_size=1, shuffle=False)
    assert finder.damaged
    with open_loader(copy, workers=0) as loader:
        loader.add_damaged(finder.damaged)
        assert (loader.n_damaged, next(loader).damaged) == (1, [])


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_damaged_samples_are_an_error(copy: Dataset, workers: int) -> None:
    for number in range(6):
        damage_sample(copy, number)
    n_samples = copy.total("samples", "train")
    settings: dict[str, Any] = {"batch_size": 2, "workers": workers}
    n_steps = make_sampler(copy, batch_size=2).last_step(1)
    with open_loader(copy, max_damaged_fraction=6 / n_samples + 1e-9, **settings) as loader:
        for _ in range(n_steps):
            next(loader)
        assert loader.n_damaged == 6
    words = rf"train-\d+\.tar: sample .*\b6 of {n_samples} samples.*data\.max_damaged_fraction="
    loader = open_loader(copy, max_damaged_fraction=5 / n_samples + 1e-9, **settings)
    with pytest.raises(DataError, match=words):
        for _ in range(n_steps):
            next(loader)


def test_a_data_set_of_damaged_samples_is_an_error(copy: Dataset) -> None:
    for shard in copy.shards("train"):
        (folder_of(copy) / shard.name).write_bytes(bytes(shard.size))
    with (
        pytest.raises(DataError, match=r"data\.max_damaged_\w+=0\.99"),
        open_loader(copy, max_damaged_fraction=0.99) as loader,
    ):
        next(loader)


@pytest.mark.parametrize("by_threads", [0, 1])
def test_a_stream_of_damaged_samples_without_shuffling_is_an_error(
    make_dataset: Callable[..., Dataset], by_threads: int
) -> None:
    """One row would search for its next token forever."""
    long = [*varied_documents(), ("long", b"z" * 20_000), *varied_documents()]
    dataset = make_dataset(long, heldout_fraction=0, shard_bytes=100_000)
    names = [entry.document for shard in dataset.shards("train") for entry in dataset.index(shard).entries]
    damage_sample(dataset, names.index("long"))
    with (
        pytest.raises(DataError, match=r"data\.shuffle=false: .*row \d .*damaged"),
        open_loader(dataset, shuffle=False, workers=by_threads) as loader,
    ):
        for _ in range(100):
            next(loader)
    with open_loader(dataset, workers=by_threads) as loader:
        for _ in range(100):
            next(loader)


def test_streams_share_the_tokens_of_a_long_document(dataset: Dataset) -> None:
    shard = dataset.shards("train")[0]
    source = SampleRef(dataset, shard, dataset.index(shard).entries[0])
    with closing(CheckedReader(Quarantine(1, 0.0))) as reader:
        first = reader.open(0, source)
        assert first.dtype == np.uint16 and reader.open(0, source) is first
        known = weakref.ref(first)
        del first
        assert known() is None  # tokens are released once no stream reads them


def other_data(folder: Path, kind: str) -> Corpus:
    documents = varied_documents()
    if kind == "altered":
        documents[0] = ("doc0", documents[0][1].replace(b"0:0", b"0:1"))
    if kind == "more":
        documents += [(f"new{n}", b"new document %d. " % n * 20) for n in range(200)]
    write_dataset(documents, folder, ByteTokenizer(), shard_bytes=12_000, heldout_fraction=0.2)
    return Corpus([Dataset.open(folder)])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("altered", r"(train|heldout)-00000\d\.tar was altered"),
        ("more", r"train-00000\d\.tar was added"),
    ],
)
def test_changed_data_are_refused_unless_accepted(dataset: Dataset, tmp_path: Path, kind: str, words: str) -> None:
    before = Corpus([dataset])
    now = other_data(tmp_path / kind, kind)
    _, state = read_world(dataset, 5)
    sampler = make_sampler(now)
    changes = describe_changes(before.record(), now.record())
    with pytest.raises(DataError, match=rf"data\.accept_changed(.|\n)*{words}"):
        read_state(state, sampler, changes=changes)
    start = read_state(state, sampler, changes=changes, accept_changed=True)
    assert (start.step, start.origin) == (5, (5, 0))
    rows, after = read_world(now, 3, state=state, accept_changed=True)
    fresh, _ = read_world(now, 3)
    assert torch.equal(rows, fresh)  # the pass that had begun restarts
    assert after["step"] == 8
    # from then on this is the run's data
    going_on, _ = read_world(now, 2, state=after)
    assert torch.equal(going_on, read_world(now, 5)[0][3:])


def test_changed_heldout_text_does_not_change_training(dataset: Dataset, copy: Dataset) -> None:
    """Nor the step at which data.epochs ends the run."""
    replace_split(folder_of(copy), "heldout", [b"another text"])
    now = Corpus([Dataset.open(folder_of(copy))])
    _, state = read_world(dataset, 5)
    start = read_state(state, make_sampler(now), accept_changed=True)
    assert (start.step, start.origin) == (5, (0, 0))
    rows, _ = read_world(now, 3, state=state, accept_changed=True)
    assert torch.equal(rows, read_world(dataset, 8)[0][5:])


def test_unchanged_data_sets_keep_their_positions(dataset: Dataset, tmp_path: Path) -> None:
    """With another dataset of another weight added."""
    other = other_data(tmp_path / "more", "more").datasets[0]
    one, both = Corpus([dataset], [1.0]), Corpus([dataset, other], [1.0, 1.0])
    _, state = read_world(one, 5)
    start = read_state(state, make_sampler(both), accept_changed=True)
    assert start.streams is not None
    assert {tuple(positions) for positions, _ in start.streams.values()} == {(5 * 64, 0)}
    lines = describe_changes(one.record(), both.record())
    assert lines[0] == "data.weights were [1.0] and are [0.5, 0.5]"
    assert lines[1] == f"dataset {other.folder.address} was added"
    assert describe_changes(both.record(), one.record())[1].endswith("was removed")


def test_a_data_set_may_move(dataset: Dataset, copy: Dataset) -> None:
    _, state = read_world(dataset, 5)
    expected, _ = read_world(dataset, 8)
    assert torch.equal(read_world(copy, 3, state=state)[0], expected[5:])


def test_long_lists_of_changes_are_truncated(dataset: Dataset, make_dataset: Callable[..., Dataset]) -> None:
    lines = describe_changes(Corpus([dataset]).record(), Corpus([make_dataset(shard_bytes=800)]).record())
    assert len(lines) == 9 and lines[-1].endswith(" more")
