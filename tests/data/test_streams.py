"""Virtual streams: nothing is lost, nothing comes twice, and any place can be returned to."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from data_helpers import numbered_text, replace_split, varied_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from reformer_dist.data import Dataset
from reformer_dist.data.order import ShardOrder, permutation, seeded_bits, shuffled
from reformer_dist.data.streams import Position, TokenStream
from reformer_dist.errors import DataError

PROMISED_SHARDS = [6, 1, 3, 5, 7, 4, 2, 0]
PROMISED_DOCUMENTS = [0, 3, 2, 1, 5, 6, 4, 7]


def open_stream(dataset: Dataset, stream: int = 0, n_streams: int = 1, **changed: object) -> TokenStream:
    settings: dict[str, object] = {"seq_len": 100, "shuffle_buffer": 5, "position": None} | changed
    order = ShardOrder(seed=3, n_shards=len(dataset.shards("train")))
    return TokenStream(dataset, order, stream=stream, n_streams=n_streams, **settings)


def tokens_of_elements(dataset: Dataset, stream: int, n_streams: int, n_elements: int) -> np.ndarray:
    """All tokens of the first `n_elements` shards of the endless sequence that this stream reads."""
    ordinals = len(range(stream, n_elements, n_streams))
    order = ShardOrder(seed=3, n_shards=len(dataset.shards("train")))
    total = sum(
        dataset.shards("train")[order.shard_at(stream + ordinal * n_streams)].tokens for ordinal in range(ordinals)
    )
    reader = open_stream(dataset, stream, n_streams, seq_len=1)
    return np.array([reader.next_row()[0] for _ in range(total)])


def split_documents(tokens: np.ndarray) -> list[bytes]:
    assert tokens[-1] == 256
    ends = np.flatnonzero(tokens == 256)
    starts = [0, *(ends[:-1] + 1)]
    return [tokens[start:end].astype(np.uint8).tobytes() for start, end in zip(starts, ends, strict=True)]


@given(st.lists(st.integers()), st.integers(1, 12), st.integers(0, 5))
def test_shuffled_keeps_all_and_reaches_no_further_than_its_buffer(
    items: list[int], buffer: int, seed: int
) -> None:
    numbered = list(enumerate(items))
    drawn = list(shuffled(numbered, buffer, seeded_bits(seed, "documents", 0)))
    assert sorted(drawn) == numbered
    assert all(number <= place + buffer - 1 for place, (number, _) in enumerate(drawn))
    if buffer == 1:
        assert drawn == numbered


def test_every_place_is_equally_likely() -> None:
    counts = np.zeros((4, 4))
    for index in range(4000):
        drawn = list(shuffled(range(4), 9, seeded_bits(0, "documents", index)))
        counts[np.arange(4), drawn] += 1
        counts[np.arange(4), permutation(4, seeded_bits(0, "shards", index))] += 1
    assert np.abs(counts / 8000 - 0.25).max() < 0.03


def test_draws_differ_by_seed_purpose_and_index() -> None:
    first = {
        int(seeded_bits(seed, purpose, index).random_raw())
        for seed in (0, 1, 2**32)
        for purpose in ("shards", "documents")
        for index in (0, 1, 7)
    }
    assert len(first) == 18


def test_the_order_is_the_one_that_was_promised() -> None:
    """The order of a seed may never change: runs that resume after an upgrade depend on it."""
    assert permutation(8, seeded_bits(0, "shards", 0)).tolist() == PROMISED_SHARDS
    assert list(shuffled(range(8), 4, seeded_bits(0, "documents", 0))) == PROMISED_DOCUMENTS


def test_shard_sequence_is_one_permutation_after_another() -> None:
    order = ShardOrder(seed=0, n_shards=7)
    epochs = [[order.shard_at(epoch * 7 + place) for place in range(7)] for epoch in range(20)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 15
    assert [order.shard_at(place) for place in range(7)] == epochs[0]  # long after it left the cache


@settings(max_examples=15, deadline=None)
@given(n_streams=st.integers(1, 7), epochs=st.integers(1, 2))
def test_an_epoch_holds_every_document_once(dataset: Dataset, n_streams: int, epochs: int) -> None:
    n_elements = epochs * len(dataset.shards("train"))
    found: Counter[bytes] = Counter()
    for stream in range(min(n_streams, n_elements)):
        found.update(split_documents(tokens_of_elements(dataset, stream, n_streams, n_elements)))
    written = dict(varied_documents()).values()
    assert set(found.values()) == {epochs}
    assert found.keys() <= set(written)
    assert len(found) == dataset.n_samples("train")


@settings(max_examples=25, deadline=None)
@given(seq_len=st.integers(1, 700), n_rows=st.integers(1, 30), buffer=st.integers(1, 9))
def test_rows_share_one_token_and_lose_none(dataset: Dataset, seq_len: int, n_rows: int, buffer: int) -> None:
    stream = open_stream(dataset, seq_len=seq_len, shuffle_buffer=buffer)
    rows = [stream.next_row() for _ in range(n_rows)]
    single = open_stream(dataset, seq_len=seq_len * n_rows, shuffle_buffer=buffer).next_row()
    assert all(len(row) == seq_len + 1 for row in rows)
    assert [row[-1] for row in rows[:-1]] == [row[0] for row in rows[1:]]
    assert np.concatenate([rows[0][:1], *(row[1:] for row in rows)]).tolist() == single.tolist()


@settings(max_examples=40, deadline=None)
@given(
    seq_len=st.integers(1, 700), before=st.integers(0, 30), buffer=st.integers(1, 100), stream=st.integers(0, 2)
)
def test_a_stream_returns_to_its_place(
    dataset: Dataset, seq_len: int, before: int, buffer: int, stream: int
) -> None:
    settings = {"seq_len": seq_len, "shuffle_buffer": buffer}
    first = open_stream(dataset, stream, 3, **settings)
    for _ in range(before):
        first.next_row()
    second = open_stream(dataset, stream, 3, position=first.position, **settings)
    for _ in range(5):
        assert first.next_row().tolist() == second.next_row().tolist()
        assert first.position == second.position


def test_documents_are_shuffled_within_shards_by_seed_and_epoch(make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset([(str(n), numbered_text(n, 20)) for n in range(100)], shard_bytes=1 << 20)
    assert len(dataset.shards("train")) == 1
    n_tokens = dataset.n_tokens("train")
    stream = open_stream(dataset, seq_len=n_tokens, shuffle_buffer=1000)
    epochs = [split_documents(stream.next_row()[:-1]) for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    in_order = split_documents(open_stream(dataset, seq_len=n_tokens, shuffle_buffer=1).next_row()[:-1])
    assert in_order == sorted(in_order, key=lambda text: int(text.split(b":")[0]))
    assert sum(a == b for a, b in zip(in_order, epochs[0], strict=True)) < 10


def test_global_random_state_is_left_alone(dataset: Dataset) -> None:
    np.random.seed(0)  # noqa: NPY002
    before = hashlib.sha256(np.random.get_state()[1].tobytes()).digest()  # noqa: NPY002
    row = open_stream(dataset).next_row()
    assert hashlib.sha256(np.random.get_state()[1].tobytes()).digest() == before  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert open_stream(dataset).next_row().tolist() == row.tolist()


def test_positions_beyond_the_data_are_refused(dataset: Dataset) -> None:
    for position in (Position(0, 10_000, 0), Position(0, 0, 10_000)):
        with pytest.raises(DataError, match="other data"):
            open_stream(dataset, position=position).next_row()


@pytest.mark.parametrize("seq_len", [1, 2, 3, 50])
def test_empty_documents_are_their_end_of_text(make_dataset: Callable[..., Dataset], seq_len: int) -> None:
    folder = make_dataset().folder
    texts = [b"", b"", b"ab", b"", b"c", b""]
    replace_split(folder, "train", texts)
    dataset = Dataset.open(folder)
    assert Counter(split_documents(tokens_of_elements(dataset, 0, 1, 1))) == Counter(texts)
    stream = open_stream(dataset, seq_len=seq_len, shuffle_buffer=1)
    tokens = np.concatenate([stream.next_row()[:-1] for _ in range(30)])
    epoch = [256, 256, 97, 98, 256, 256, 99, 256, 256]
    assert tokens.tolist() == (epoch * (len(tokens) // 9 + 1))[: len(tokens)]
    resumed = open_stream(dataset, seq_len=seq_len, shuffle_buffer=1, position=stream.position)
    assert resumed.next_row().tolist() == stream.next_row().tolist()
