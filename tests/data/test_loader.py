"""The rows of a step are the same in any world, and a loader resumes exactly from its state."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.datasets import (
    damage_sample,
    folder_of,
    make_sampler,
    open_loader,
    read_steps,
    read_world,
    replace_split,
    rows_of,
)

from reformer_dist.config import DataConfig, RunConfig, TrainerConfig
from reformer_dist.data import (
    Corpus,
    Dataset,
    LoaderState,
    Replay,
    consumed_hash,
    merge_states,
    saved_interleaving,
)
from reformer_dist.data.loading import loader as loader_module
from reformer_dist.errors import DataError
from reformer_dist.run.data import TrainingData


@pytest.mark.parametrize(
    ("dp_size", "micro_batch_size", "workers"),
    [(1, 1, 0), (1, 4, 1), (1, 8, 3), (2, 1, 3), (2, 2, 0), (2, 4, 1), (4, 2, 3), (8, 1, 1)],
)
def test_rows_are_the_same_in_any_world(
    dataset: Dataset, dp_size: int, micro_batch_size: int, workers: int
) -> None:
    rows, state = read_world(dataset, 12, dp_size, micro_batch_size=micro_batch_size, workers=workers)
    expected, expected_state = read_world(dataset, 12)
    assert torch.equal(rows, expected)
    assert state == expected_state


def test_shapes(dataset: Dataset) -> None:
    [batch], state = read_steps(dataset, 1, dp_rank=1, dp_size=2, micro_batch_size=2)
    assert len(batch.batches) == 2
    for rows in batch.batches:
        assert rows["tokens"].shape == rows["labels"].shape == (2, 64)
        assert rows["tokens"].dtype == rows["labels"].dtype == torch.int64
    assert sorted(state["streams"]) == ["4", "5", "6", "7"]


def test_seeds_and_steps_differ(dataset: Dataset) -> None:
    first, _ = read_world(dataset, 4)
    other, _ = read_world(dataset, 4, seed=4)
    assert not torch.equal(first, other)
    assert len({tuple(row.tolist()) for row in first[:, 0].flatten(0, 1)}) == 32


WORLDS = st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([0, 1, 3]))


@settings(max_examples=40, deadline=None)
@given(
    n_steps=st.integers(1, 60),
    seq_len=st.sampled_from([1, 7, 64, 400, 2500]),
    worlds=st.tuples(WORLDS, WORLDS),
    weights=st.sampled_from([None, [0.3, 0.7]]),
    damaged=st.booleans(),
)
def test_resume_is_exact_and_elastic(
    corpora: dict[bool, Corpus],
    n_steps: int,
    seq_len: int,
    worlds: tuple[tuple[int, int], tuple[int, int]],
    weights: list[float] | None,
    damaged: bool,
) -> None:
    """Two datasets, pooled or mixed, whole or damaged; resumed on another number of ranks and threads."""
    corpus = Corpus(corpora[damaged].datasets, weights)
    changed: dict[str, Any] = {"seq_len": seq_len, "batch_size": 4}
    whole, end = read_world(corpus, n_steps + 3, **changed)
    (first_ranks, first_workers), (then_ranks, then_workers) = worlds
    before, state = read_world(corpus, n_steps, first_ranks, workers=first_workers, **changed)
    after, resumed_end = read_world(corpus, 3, then_ranks, workers=then_workers, state=state, **changed)
    assert torch.equal(torch.cat([before, after]), whole)
    assert resumed_end == end
    assert consumed_hash(state) != consumed_hash(end)


@pytest.fixture(scope="module")
def corpora(make_dataset: Callable[..., Dataset]) -> dict[bool, Corpus]:
    """Two datasets, undamaged and damaged."""
    both = {}
    for damaged in (False, True):
        datasets = [make_dataset(), make_dataset([(f"n{n}", b"number %d. " % n * (n % 7 + 1)) for n in range(80)])]
        if damaged:
            for number in (0, 7, 8, 20):
                damage_sample(datasets[0], number)
                damage_sample(datasets[1], number)
        both[damaged] = Corpus(datasets)
    return both


def test_the_state_is_that_of_the_batch_despite_prefetching(dataset: Dataset) -> None:
    with open_loader(dataset, workers=2) as loader:
        state = next(loader).state
        time.sleep(0.2)  # the threads have read ahead by now
        expected = next(loader)
    [resumed], _ = read_steps(dataset, 1, state=state)
    assert torch.equal(rows_of([resumed], "tokens"), rows_of([expected], "tokens"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 4}, r"^trainer\.seed=4: .*\btrainer\.seed=3\b"),
        ({"shuffle": False}, r"^data\.shuffle=false: .*\bdata\.shuffle=true\b"),
    ],
)
def test_states_of_other_settings_are_refused(dataset: Dataset, changed: dict[str, Any], message: str) -> None:
    _, state = read_steps(dataset, 1)
    with pytest.raises(DataError, match=message):
        open_loader(dataset, state=state, **changed)


@pytest.mark.parametrize("dp_size", [1, 2])
def test_runs_from_before_shards_were_interleaved_keep_their_order(dataset: Dataset, dp_size: int) -> None:
    """Their state has version 2; that of a resumed run says what its order is."""
    changed: dict[str, Any] = {"batch_size": 2, "interleaved_shards": 1}
    expected, end = read_world(dataset, 30, **changed)
    _, state = read_world(dataset, 20, **changed)
    assert saved_interleaving(state) == 1
    del state["settings"]["interleaved_shards"], state["settings"]["weights"], state["cuts"]
    state |= {"version": 2, "data": Corpus([dataset]).fingerprint_with_weights}
    assert saved_interleaving(state) == 1
    after, resumed = read_world(dataset, 10, dp_size, state=state, **changed)
    assert torch.equal(after, expected[20:])
    assert resumed == end
    with pytest.raises(DataError, match="interleaved_shards was 1 and is 8"):
        open_loader(dataset, state=state, batch_size=2)
    # a run's checkpoint decides
    config = RunConfig(data=DataConfig(batch_size=2, seq_len=64), trainer=TrainerConfig(seed=3))
    checkpoint: Any = SimpleNamespace(rank_states=[{"data": state}], record=SimpleNamespace(data=None))
    training = TrainingData.open(config, Corpus([dataset]), checkpoint)
    assert (training.sampler.interleaved_shards, training.state.step) == (1, 20)
    for wrong in (0, "2", None):
        with pytest.raises(DataError, match=f"interleaved_shards is {wrong!r}"):
            saved_interleaving({**end, "settings": {"interleaved_shards": wrong}})


@pytest.mark.parametrize(
    "stream",
    [None, [1], [0, 0, "00" * 16], [-1, "00" * 16], [1.5, "00" * 16], [True, "00" * 16], [0, "xy"], "012"],
)
def test_broken_states_are_refused(dataset: Dataset, stream: object) -> None:
    _, state = read_steps(dataset, 1)
    with pytest.raises(DataError, match="stream 3 is"):
        open_loader(dataset, state={**state, "streams": {**state["streams"], "3": stream}})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("streams", None, "streams is None"),
        ("version", 1, "version 1 "),
        ("settings", None, "settings has no seed"),
        ("step", -1, "step is -1"),
        ("origin", [0], "origin is"),
        ("quarantine", [[1]], "quarantine is"),
    ],
)
def test_broken_parts_of_states_are_refused(dataset: Dataset, key: str, value: object, message: str) -> None:
    _, state = read_steps(dataset, 1)
    with pytest.raises(DataError, match=message):
        open_loader(dataset, state={**state, key: value})


def test_states_of_different_runs_do_not_merge(dataset: Dataset) -> None:
    states = [read_steps(dataset, 1, seed=seed)[1] for seed in (1, 2)]
    with pytest.raises(DataError, match="one run"):
        merge_states(states)
    with pytest.raises(DataError, match=r"data state: .*at least one"):
        merge_states([])


def test_a_state_that_lacks_streams_is_refused(dataset: Dataset) -> None:
    _, state = read_steps(dataset, 1, dp_rank=0, dp_size=2)
    with pytest.raises(DataError, match="stream 4 is None"):
        open_loader(dataset, dp_rank=1, dp_size=2, state=state)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_errors_of_threads_reach_the_consumer(make_dataset: Callable[..., Dataset], workers: int) -> None:
    """At the step that they belong to, despite prefetching."""
    dataset = make_dataset(shard_bytes=3000)
    lost = dataset.shards("train")[-1].name
    replay = Replay(make_sampler(dataset, batch_size=4, shuffle=False), LoaderState())
    while not any(span.ref.shard.name == lost for row in replay.next_step() for span in row):
        pass
    (folder_of(dataset) / lost).unlink()
    before = threading.active_count()
    loader = open_loader(dataset, workers=workers, batch_size=4, shuffle=False)
    n_read = 0
    with pytest.raises(DataError, match=r"train-\d+\.tar: .*missing"):
        for n_read in range(1000):  # noqa: B007
            next(loader)
    assert n_read == replay.step - 1 > 2 + loader_module.PREFETCH_STEPS
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 3])
def test_close_stops_the_threads(dataset: Dataset, workers: int) -> None:
    before = threading.active_count()
    with open_loader(dataset, workers=workers) as loader:
        assert threading.active_count() == before  # reading begins with the first step
        next(iter(loader))
        assert threading.active_count() == before + workers
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    loader.close()


def test_close_wakes_a_waiting_thread(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waits for a step must return when another thread closes the loader."""
    answer = threading.Event()
    monkeypatch.setattr(loader_module._StreamReader, "next_rows", lambda self: answer.wait(30))
    loader = open_loader(dataset, workers=1)
    errors: list[BaseException] = []

    def wait_for_a_step() -> None:
        try:
            next(loader)
        except RuntimeError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait_for_a_step, daemon=True)
    waiting.start()
    time.sleep(0.2)
    threading.Timer(0.5, answer.set).start()
    loader.close()
    waiting.join(10)
    assert len(errors) == 1 and "closed" in str(errors[0])


def test_an_interrupt_closes_the_loader(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    loader = open_loader(dataset, workers=2)
    next(loader)

    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loader_module._ReaderThread, "next_rows", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(loader)
    assert threading.active_count() == before


def test_prefetching_is_bounded(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    read = loader_module._StreamReader.next_rows
    monkeypatch.setattr(loader_module._StreamReader, "next_rows", lambda self: steps.append(1) or read(self))
    with open_loader(dataset, workers=1) as loader:
        next(loader)
        time.sleep(0.3)
        assert len(steps) <= 2 + loader_module.PREFETCH_STEPS


def test_an_indivisible_batch_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="batch_size=8"):
        open_loader(dataset, dp_size=3)
    with pytest.raises(ValueError, match=r"\b3\b"):
        open_loader(dataset, micro_batch_size=3)


@pytest.mark.parametrize("texts", [[b"", b""], [b"abc"]])
def test_a_split_with_too_little_text_is_refused(make_dataset: Callable[..., Dataset], texts: list[bytes]) -> None:
    folder = folder_of(make_dataset())
    replace_split(folder, "train", texts)
    with pytest.raises(DataError, match=r"\b(no|too little) text"):
        open_loader(Dataset.open(folder))
