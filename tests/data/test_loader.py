"""The rows of a step are the same for any world, and a loader goes on exactly where its state says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import replace_split
from hypothesis import given, settings
from hypothesis import strategies as st

from reformer_dist.data import Dataset, StepBatch, TrainLoader, merge_states
from reformer_dist.errors import DataError


def open_loader(dataset: Dataset, **changed: Any) -> TrainLoader:
    settings = {"seq_len": 64, "batch_size": 8, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1}
    return TrainLoader(dataset, **(settings | {"shuffle_buffer": 5, "seed": 3} | changed))


def read_steps(dataset: Dataset, n_steps: int, **changed: Any) -> list[StepBatch]:
    with open_loader(dataset, **changed) as loader:
        return [next(loader) for _ in range(n_steps)]


def read_world(
    dataset: Dataset, n_steps: int, dp_size: int, **changed: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Rows of all ranks [n_steps, batch_size, seq_len + 1], and the state after them."""
    ranks = [read_steps(dataset, n_steps, dp_rank=rank, dp_size=dp_size, **changed) for rank in range(dp_size)]
    rows = [torch.cat([batch.tokens.flatten(0, 1) for batch in step]) for step in zip(*ranks, strict=True)]
    return torch.stack(rows), merge_states([steps[-1].state for steps in ranks])


@pytest.mark.parametrize(
    ("dp_size", "micro_batch_size"), [(1, 1), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)]
)
def test_no_world_changes_the_rows(dataset: Dataset, dp_size: int, micro_batch_size: int) -> None:
    rows, state = read_world(dataset, 12, dp_size, micro_batch_size=micro_batch_size)
    expected, expected_state = read_world(dataset, 12, 1, micro_batch_size=8)
    assert torch.equal(rows, expected)
    assert state == expected_state


def test_shapes(dataset: Dataset) -> None:
    [batch] = read_steps(dataset, 1, dp_rank=1, dp_size=2)
    assert batch.tokens.shape == (2, 2, 65)
    assert batch.tokens.dtype == torch.int64
    assert sorted(batch.state["streams"]) == ["4", "5", "6", "7"]


def test_seeds_and_steps_differ(dataset: Dataset) -> None:
    first, _ = read_world(dataset, 4, 1)
    other, _ = read_world(dataset, 4, 1, seed=4)
    assert not torch.equal(first, other)
    assert len({tuple(row.tolist()) for row in first.flatten(0, 1)}) == 32


@settings(max_examples=25, deadline=None)
@given(
    n_steps=st.integers(1, 12),
    seq_len=st.sampled_from([1, 7, 64, 400, 2500]),
    shuffle_buffer=st.sampled_from([1, 3, 100]),
    worlds=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
)
def test_resume_is_exact_and_elastic(
    dataset: Dataset, n_steps: int, seq_len: int, shuffle_buffer: int, worlds: tuple[int, int]
) -> None:
    changed = {"seq_len": seq_len, "shuffle_buffer": shuffle_buffer, "batch_size": 4, "micro_batch_size": 1}
    whole, end = read_world(dataset, n_steps + 3, 1, **changed)
    before, state = read_world(dataset, n_steps, worlds[0], **changed)
    state = json.loads(json.dumps(state))
    after, resumed_end = read_world(dataset, 3, worlds[1], state=state, **changed)
    assert torch.equal(torch.cat([before, after]), whole)
    assert resumed_end == end


def test_state_is_that_of_the_batch_and_not_of_the_reader_ahead(dataset: Dataset) -> None:
    with open_loader(dataset) as loader:
        first = next(loader)
        time.sleep(0.2)  # the thread is steps ahead by now
        expected = next(loader)
    [resumed] = read_steps(dataset, 1, state=first.state)
    assert torch.equal(resumed.tokens, expected.tokens)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seq_len": 32}, "seq_len was 64 and is 32 now"),
        ({"batch_size": 4}, "batch_size was 8 and is 4 now"),
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"shuffle_buffer": 6}, "shuffle_buffer was 5"),
    ],
)
def test_states_of_other_settings_are_refused(dataset: Dataset, changed: dict[str, int], message: str) -> None:
    [batch] = read_steps(dataset, 1)
    with pytest.raises(DataError, match=message):
        open_loader(dataset, state=batch.state, **changed)


def test_states_of_other_data_are_refused(dataset: Dataset, make_dataset: Callable[..., Dataset]) -> None:
    [batch] = read_steps(dataset, 1)
    other = make_dataset(shard_bytes=1 << 20)
    with pytest.raises(DataError, match="dataset was"):
        open_loader(other, state=batch.state)


@pytest.mark.parametrize("numbers", [None, [1, 2], [0, 0, -1], [0, 0, 1.5], "012", [0, 0, True]])
def test_broken_states_are_refused(dataset: Dataset, numbers: object) -> None:
    [batch] = read_steps(dataset, 1)
    state = {**batch.state, "streams": {**batch.state["streams"], "3": numbers}}
    with pytest.raises(DataError, match="stream 3 is"):
        open_loader(dataset, state=state)
    with pytest.raises(DataError, match="streams is None"):
        open_loader(dataset, state={**batch.state, "streams": None})


def test_states_of_different_runs_do_not_merge(dataset: Dataset) -> None:
    [first], [second] = (read_steps(dataset, 1, seed=seed) for seed in (1, 2))
    with pytest.raises(DataError, match="not of one run"):
        merge_states([first.state, second.state])
    with pytest.raises(DataError, match="none"):
        merge_states([])


def test_a_state_that_lacks_streams_is_refused(dataset: Dataset) -> None:
    [batch] = read_steps(dataset, 1, dp_rank=0, dp_size=2)
    with pytest.raises(DataError, match="stream 4 is None"):
        open_loader(dataset, dp_rank=1, dp_size=2, state=batch.state)


def test_errors_of_the_thread_reach_the_consumer(make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset()
    for shard in dataset.shards("train")[1:]:
        path: Path = dataset.folder / shard.name
        path.write_bytes(path.read_bytes()[:700])
    loader = open_loader(dataset)
    with pytest.raises(DataError, match=r"train-00000\d\.tar.*torn"):
        for _ in range(500):
            next(loader)
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_close_stops_the_thread(dataset: Dataset) -> None:
    before = threading.active_count()
    with open_loader(dataset) as loader:
        assert threading.active_count() == before  # reading begins with the first step
        next(iter(loader))
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    loader.close()


def test_reading_ahead_is_bounded(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    read = TrainLoader._read_step
    monkeypatch.setattr(TrainLoader, "_read_step", lambda self: steps.append(1) or read(self))
    with open_loader(dataset) as loader:
        next(loader)
        time.sleep(0.2)
        assert len(steps) == 3


def test_a_batch_that_does_not_divide(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="batch_size=8"):
        open_loader(dataset, dp_size=3)
    with pytest.raises(ValueError, match="micro-batches of 3"):
        open_loader(dataset, micro_batch_size=3)


def test_a_split_without_text_is_refused(make_dataset: Callable[..., Dataset]) -> None:
    folder = make_dataset().folder
    replace_split(folder, "train", [b"", b""])
    with pytest.raises(DataError, match="holds no text"):
        open_loader(Dataset.open(folder))
