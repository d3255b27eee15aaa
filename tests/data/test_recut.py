"""Rows that change in the middle of a pass: no token is read twice or left out, in any world or resume."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.datasets import make_sampler, open_loader, read_steps, read_world

from reformer_dist.data import Corpus, Dataset, LoaderState, Replay, consumed_hash, read_state
from reformer_dist.data.loading.cut import Cut, Era, StreamPart, recut
from reformer_dist.errors import DataError

ERAS = st.lists(
    st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([3, 64, 500])),
    min_size=2,
    max_size=4,
)
"""(steps, batch_size, seq_len) of the eras of a run."""


def part_units(cut: Cut, n_units: int, stream: int, n_streams: int, passes: int) -> list[tuple[int, int]]:
    """(pass, unit) of everything that a stream reads before a pass."""
    part = StreamPart(cut, n_units, stream, n_streams)
    positions = range(cut.position, part.position_after(passes))
    return [part.locate(position)[:2] for position in positions]


@settings(max_examples=100, deadline=None)
@given(
    n_units=st.integers(12, 60),
    counts=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    draw=st.randoms(use_true_random=False),
)
def test_every_unit_of_every_pass_is_read_once(n_units: int, counts: list[int], draw: Any) -> None:
    """Streams are cut anew at any positions, also where some of them are a pass ahead."""
    cut, passes, read = Cut(), 8, Counter[tuple[int, int]]()
    for n_streams in counts[:-1]:
        units = [part_units(cut, n_units, stream, n_streams, 5) for stream in range(n_streams)]
        n_read = [draw.randint(0, len(each)) for each in units]
        for each, n in zip(units, n_read, strict=True):
            read.update(each[:n])
        cut = recut(cut, [cut.position + n for n in n_read], n_units)
    for stream in range(counts[-1]):
        read.update(part_units(cut, n_units, stream, counts[-1], passes))
    assert read == Counter(itertools.product(range(passes), range(n_units)))


@given(length=st.integers(2, 9), n_streams=st.integers(1, 8), odd=st.integers(0, 7), data=st.data())
def test_streams_that_are_equally_far_continue_where_they_are(
    length: int, n_streams: int, odd: int, data: st.DataObject
) -> None:
    """In the middle of a pass, which some streams read one unit more of than others."""
    n_units, n_read = length * n_streams + odd % n_streams, data.draw(st.integers(0, length - 1))
    cut = recut(Cut(), [n_read] * n_streams, n_units)
    for stream in range(n_streams):
        before, after = (StreamPart(each, n_units, stream, n_streams) for each in (Cut(), cut))
        places = range(n_read, n_read + 2 * n_units)
        assert [after.locate(place)[:2] for place in places] == [before.locate(place)[:2] for place in places]


def read_eras(
    data: Dataset | Corpus, eras: list[tuple[int, int, int]], dp_size: int = 1, **changed: Any
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Rows of each era, read by as many ranks as there are rows for, and the state after the last one."""
    state, rows = changed.pop("state", None), []
    for n_steps, batch_size, seq_len in eras:
        own = {"batch_size": batch_size, "seq_len": seq_len, "interleaved_shards": 2, **changed}
        read, state = read_world(data, n_steps, min(dp_size, batch_size & -batch_size), state=state, **own)
        rows.append(read)
    assert state is not None
    return rows, state


@settings(max_examples=15, deadline=None)
@given(eras=ERAS, dp_size=st.sampled_from([2, 4]), weights=st.sampled_from([None, [0.3, 0.7]]), data=st.data())
def test_eras_are_alike_in_any_world_and_after_any_resume(
    corpora: Corpus, eras: list[tuple[int, int, int]], dp_size: int, weights: list[float] | None, data: Any
) -> None:
    corpus = Corpus(corpora.datasets, weights)
    rows, state = read_eras(corpus, eras)
    others, other_state = read_eras(corpus, eras, dp_size)
    assert other_state == state
    assert all(torch.equal(one, other) for one, other in zip(rows, others, strict=True))
    number = data.draw(st.integers(0, len(eras) - 1))
    n_before = data.draw(st.integers(0, eras[number][0]))  # the whole era: a stop at the border
    n_steps, *own = eras[number]
    before = [*eras[:number], *([(n_before, *own)] if n_before else [])]
    after = [*([(n_steps - n_before, *own)] if n_before < n_steps else []), *eras[number + 1 :]]
    if before and after:
        _, saved = read_eras(corpus, before)
        resumed, end = read_eras(corpus, after, dp_size, state=saved)
        assert end == state
        assert torch.equal(resumed[-1], rows[-1][-len(resumed[-1]) :])


@pytest.fixture(scope="module")
def corpora(make_dataset: Callable[..., Dataset]) -> Corpus:
    second = [(f"n{n}", b"number %d. " % n * (n % 7 + 1)) for n in range(80)]
    return Corpus([make_dataset(), make_dataset(second)])


@settings(max_examples=15, deadline=None)
@given(eras=ERAS, last=st.tuples(st.sampled_from([1, 3, 8]), st.sampled_from([40, 700])))
def test_two_passes_predict_every_token_twice(
    corpora: Corpus, eras: list[tuple[int, int, int]], last: tuple[int, int]
) -> None:
    """Whatever the eras, and in the number of steps that is known before the first."""
    passes, state, read, end, sampler = 2, LoaderState(), Counter[str](), 0, None
    lengths = [*eras, (None, *last)]
    planned = []
    for n_steps, batch_size, seq_len in lengths:
        end += n_steps or 0
        planned.append(Era(end if n_steps else None, batch_size, seq_len))
    first = make_sampler(corpora, batch_size=lengths[0][1], seq_len=lengths[0][2], interleaved_shards=2)
    last_step = first.last_step(passes, eras=planned)
    for n_steps, batch_size, seq_len in lengths:
        before = sampler
        sampler = make_sampler(corpora, batch_size=batch_size, seq_len=seq_len, interleaved_shards=2)
        if before is not None:
            state = read_state(state.to_json(before), sampler)
        replay = Replay(sampler, state, passes=passes)
        while replay.step < last_step and (n_steps is None or n_steps > 0):
            for spans in replay.next_step():
                read.update(
                    f"{span.id.partition(':')[0]}:{i}" for span in spans for i in range(span.start, span.stop)
                )
            n_steps = None if n_steps is None else n_steps - 1
        state = replay.state
    assert set(read.values()) == {passes}
    assert read.total() == passes * corpora.total("tokens", "train")
    assert not any(replay.next_step())


def test_the_hash_and_the_positions_go_on(dataset: Dataset) -> None:
    _, before = read_world(dataset, 3, batch_size=4)
    _, after = read_world(dataset, 1, batch_size=2, state=before, interleaved_shards=4)
    assert after["step"] == 4 and after["origin"] == [3, 0]
    assert [cut[0] for cut in after["cuts"]] == [3 * 64]
    assert {value[0] for value in after["streams"].values()} == {4 * 64}
    other = {**before, "streams": {**before["streams"], "3": [*before["streams"]["3"][:-1], "00" * 16]}}
    _, other_end = read_world(dataset, 1, batch_size=2, state=other, interleaved_shards=4)
    assert consumed_hash(after) != consumed_hash(other_end)  # covers every stream before the recut


def test_weights_change_without_a_recut(corpora: Corpus) -> None:
    even, uneven = (Corpus(corpora.datasets, weights) for weights in ([1, 1], [1, 3]))
    _, before = read_world(even, 6)
    rows, after = read_world(uneven, 4, state=before)
    assert after["cuts"] == before["cuts"] == [[0, 0, []]] * 2
    assert rows.shape[0] == 4
    taken = [
        sum(after["streams"][key][pool] - before["streams"][key][pool] for key in after["streams"]) // 64
        for pool in (0, 1)
    ]
    assert taken == [8, 24]
    with pytest.raises(DataError, match="the data differ"):  # one pool of both datasets
        read_world(corpora, 1, state=before)


@pytest.mark.parametrize(
    "cuts",
    [None, 3, [], [[0, 0, []]] * 2, [[-1, 0, []]], [[0, 0, [[[5, 5]]]]], [[0, 0, [[[0, 10**9]]]]], [[0, 0]]],
)
def test_invalid_cuts_are_refused(dataset: Dataset, cuts: Any) -> None:
    _, state = read_steps(dataset, 1)
    with pytest.raises(DataError, match=r"^data state: cuts"):
        open_loader(dataset, state={**state, "cuts": cuts})


def test_positions_before_the_cut_are_refused(dataset: Dataset) -> None:
    _, state = read_steps(dataset, 1)
    with pytest.raises(DataError, match=r"^data state: stream 0"):
        open_loader(dataset, state={**state, "cuts": [[65, 0, []]]})


def test_damage_does_not_make_streams_overlap(dataset: Dataset) -> None:
    """Streams that skipped damaged samples are further than others when the rows change."""
    sampler = make_sampler(dataset, batch_size=4, seq_len=200, interleaved_shards=2)
    damaged = {
        (0, shard.shard.name, entry.key) for shard in sampler.pools[0].shards for entry in shard.index.entries[::5]
    }
    first = Replay(sampler, LoaderState(), damaged, passes=1)
    read = Counter(span.id for _ in range(9) for spans in first.next_step() for span in spans)
    assert len({stream.positions[0] for stream in first._streams}) > 1
    fewer = make_sampler(dataset, batch_size=3, seq_len=70, interleaved_shards=2)
    second = Replay(fewer, first.state.recut(fewer), damaged, passes=1)
    while any(rows := second.next_step()):
        read.update(span.id for spans in rows for span in spans)
    tokens = Counter[str]()
    for name, count in read.items():
        sample, _, bounds = name.partition(":")
        start, stop = map(int, bounds.split("-"))
        tokens.update({f"{sample}:{place}": count for place in range(start, stop)})
    assert set(tokens.values()) == {1}
    lost = sum(entry.n_tokens for shard in sampler.pools[0].shards for entry in shard.index.entries[::5])
    assert tokens.total() == dataset.total("tokens", "train") - lost
