"""Passes, ranges and mixing: every unit is read once, and any position is found in constant time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.datasets import documents_of, folder_of, make_sampler, numbered_text, read_world, replace_split

from reformer_dist.data import IGNORE_INDEX, Corpus, Dataset, SampleRef, next_token_examples
from reformer_dist.data.format import index as index_module
from reformer_dist.data.format.sample_reader import SampleReader
from reformer_dist.data.loading.packing import Span, TokenStream, pack_spans
from reformer_dist.data.loading.sampler import permutation, seeded_bits

PROMISED_PERMUTATION = [6, 1, 3, 5, 7, 4, 2, 0]


def lengths(dataset_index: int, ref: SampleRef) -> range:
    """A stand-in for the tokens of a sample if only positions matter."""
    return range(ref.entry.n_tokens)


def tokens_of_stream(dataset: Dataset, stream: int, passes: int = 1, **changed: Any) -> list[Span]:
    """All spans of a stream in some passes."""
    reader = TokenStream(make_sampler(dataset, **changed), stream, passes=passes)
    spans: list[Span] = []
    while row := reader.next_spans(0, lengths):
        spans += row
    return spans


def test_permutations_are_stable_across_versions() -> None:
    """The order of a seed must never change: runs that resume after an upgrade depend on it."""
    assert permutation(8, seeded_bits(0, "shards", 0)).tolist() == PROMISED_PERMUTATION


@pytest.mark.parametrize(
    ("interleaved_shards", "expected"),
    [
        # of runs that began before shards were interleaved
        (1, ["000001.tar/00000011:0-48", "000001.tar/00000009:0-16", "000001.tar/00000009:16-80"]),
        (None, ["000001.tar/00000013:0-8", "000004.tar/00000042:0-43", "000001.tar/00000009:0-13"]),
    ],
)
def test_the_order_is_stable_across_versions(
    dataset: Dataset, interleaved_shards: int | None, expected: list[str]
) -> None:
    spans = tokens_of_stream(dataset, 0, interleaved_shards=interleaved_shards)
    assert [span.id for span in spans[: len(expected)]] == [f"0/train-{span}" for span in expected]


def longest_run(dataset: Corpus, source_of: Callable[[Span], str], **changed: Any) -> int:
    """The most consecutive tokens of a pass of one stream that come from one source."""
    longest, run, last = 0, 0, ""
    sampler = make_sampler(dataset, batch_size=1, seq_len=512, **changed)
    reader = TokenStream(sampler, 0, passes=1)
    while row := reader.next_spans(0, lengths):
        for span in row:
            source = source_of(span)
            run = run + span.stop - span.start if source == last else span.stop - span.start
            longest, last = max(longest, run), source
    return longest


def test_no_source_lasts_long_if_rows_are_few_and_long(make_dataset: Callable[..., Dataset]) -> None:
    """1,200 documents of 500 bytes of each of two kinds, in shards of 60 documents, read by one stream.

    With fair draws, a run of 22 documents has a probability below 0.1 %.
    """
    kinds = [[(f"{kind}{n}", numbered_text(n, 500)) for n in range(1200)] for kind in "ab"]
    limit = 22 * 501
    # written in the order of a hash: mixed in every shard, whatever the sampler does
    mixed = Corpus([make_dataset(kinds[0] + kinds[1], heldout_fraction=0, shard_bytes=60 * 1024)])
    assert longest_run(mixed, lambda span: span.ref.entry.document[0], interleaved_shards=1) < limit
    # two datasets, as if one had been written in the order of its sources: shards of one kind each
    pooled = Corpus([make_dataset(kind, heldout_fraction=0, shard_bytes=60 * 1024) for kind in kinds])
    assert len(pooled.shards("train")) == 42
    assert longest_run(pooled, lambda span: str(span.dataset_index)) < limit
    assert longest_run(pooled, lambda span: str(span.dataset_index), interleaved_shards=1) > 3 * limit
    # many rows read many shards at a time anyway
    assert [make_sampler(pooled, batch_size=n).interleaved_shards for n in (1, 3, 8, 16, 64)] == [16, 6, 2, 1, 1]


def test_groups_of_shards_differ_from_pass_to_pass(make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset([(str(n), numbered_text(n, 500)) for n in range(700)], shard_bytes=20 * 1024)
    pool = make_sampler(dataset, batch_size=1).pools[0]
    groups = [frozenset(shard.shard.name for shard in pool.group_at(number, 0).shards) for number in range(3)]
    assert len(set(groups)) == 3 and {len(group) for group in groups} <= {9, 10, 11, 12, 13, 14, 15, 16}


def test_permutations_are_uniform() -> None:
    counts = np.zeros((4, 4))
    for index in range(4000):
        counts[np.arange(4), permutation(4, seeded_bits(0, "shards", index))] += 1
    assert np.abs(counts / 4000 - 0.25).max() < 0.03


def test_draws_differ_by_seed_purpose_and_index() -> None:
    keys = [(seed, purpose, index) for seed in (0, 1, 2**32) for purpose in ("a", "b") for index in (0, 1, 7)]
    assert len({int(seeded_bits(*key).random_raw()) for key in keys}) == 18


@settings(max_examples=25, deadline=None)
@given(n_streams=st.integers(1, 40), passes=st.integers(1, 3), seq_len=st.integers(1, 900), shuffle=st.booleans())
def test_a_pass_holds_every_token_once(
    dataset: Dataset, n_streams: int, passes: int, seq_len: int, shuffle: bool
) -> None:
    changed = {"batch_size": n_streams, "seq_len": seq_len, "shuffle": shuffle}
    found: Counter[tuple[str, str, int]] = Counter()
    steps = []
    for stream in range(n_streams):
        spans = tokens_of_stream(dataset, stream, passes, **changed)
        for span in spans:
            name = (span.ref.shard.name, span.ref.entry.key)
            found.update((*name, place) for place in range(span.start, span.stop))
        steps.append(-(-sum(span.stop - span.start for span in spans) // seq_len))
    assert set(found.values()) == {passes}
    assert len(found) == dataset.total("tokens", "train")
    # the planned number of steps, and all streams are within a row of each other
    assert max(steps) == make_sampler(dataset, **changed).last_step(passes)
    assert max(steps) - min(steps) <= passes


@settings(max_examples=40, deadline=None)
@given(
    seq_len=st.integers(1, 700),
    before=st.integers(0, 30),
    stream=st.integers(0, 2),
    lost=st.sets(st.integers(0, 40)),
)
def test_a_stream_resumes_at_its_position(
    dataset: Dataset, seq_len: int, before: int, stream: int, lost: set[int]
) -> None:
    """Also if samples are skipped."""

    def open_sample(dataset_index: int, ref: SampleRef) -> range | None:
        return None if int(ref.entry.key) in lost else range(ref.entry.n_tokens)

    sampler = make_sampler(dataset, seq_len=seq_len, batch_size=3)
    first = TokenStream(sampler, stream)
    for _ in range(before):
        first.next_spans(0, open_sample)
    second = TokenStream(sampler, stream, positions=first.positions, digest=first.digest)
    for _ in range(5):
        assert [span.id for span in first.next_spans(0, open_sample)] == [
            span.id for span in second.next_spans(0, open_sample)
        ]
        assert (first.positions, first.digest) == (second.positions, second.digest)


def test_rows_are_the_documents_and_the_token_before_them(dataset: Dataset) -> None:
    """One unshuffled pass of one stream is the text itself after an end-of-text token."""
    text = np.concatenate(documents_of(dataset))
    n_steps = len(text) // 64
    rows, _ = read_world(dataset, n_steps, batch_size=1, shuffle=False)
    assert rows[:, 1].flatten().tolist() == text[: n_steps * 64].tolist()
    assert rows[:, 0].flatten().tolist() == [256, *text[: n_steps * 64 - 1].tolist()]


def test_the_end_of_the_last_pass_is_padding(dataset: Dataset) -> None:
    n_tokens = dataset.total("tokens", "train")
    sampler = make_sampler(dataset, seq_len=500, batch_size=3)
    rows, _ = read_world(dataset, sampler.last_step(2) + 1, seq_len=500, batch_size=3, passes=2)
    assert int((rows[:, 1] != -100).sum()) == 2 * n_tokens
    assert (rows[-1, 1] == -100).all() and (rows[-1, 0] == 256).all()


def test_samples_are_shuffled_within_and_across_shards(make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset([(str(n), numbered_text(n, 20)) for n in range(200)], shard_bytes=30_000)
    assert len(dataset.shards("train")) > 3

    def keys(passes: int, **changed: Any) -> list[str]:
        spans = tokens_of_stream(dataset, 0, passes, batch_size=1, **changed)
        return [span.ref.entry.key for span in spans if span.start == 0]

    plain = keys(1, shuffle=False)
    assert plain == sorted(plain)
    both = keys(2)
    first, second = both[: len(plain)], both[len(plain) :]
    assert sorted(first) == sorted(second) == plain
    for one, other in ((plain, first), (first, second)):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


def test_document_starts_can_be_masked(dataset: Dataset) -> None:
    n_steps = make_sampler(dataset).last_step(1) - 1  # within one pass, so that no range ends within a document
    plain, state = read_world(dataset, n_steps)
    masking = next_token_examples(64, 256, mask_document_starts=True)
    masked, masked_state = read_world(dataset, n_steps, make_example=masking)
    inputs, labels, kept = plain[:, 0], plain[:, 1], masked[:, 1]
    assert torch.equal(masked[:, 0], inputs) and state == masked_state
    starts = kept != labels
    assert starts.any() and (kept[starts] == -100).all()
    # a document's first token follows an end-of-text token
    assert (inputs[starts] == 256).all() and (kept[inputs == 256] == -100).all()


@pytest.mark.parametrize("seq_len", [1, 2, 3, 50])
def test_empty_documents_are_read_as_end_of_text(make_dataset: Callable[..., Dataset], seq_len: int) -> None:
    folder = folder_of(make_dataset())
    replace_split(folder, "train", [b"", b"", b"ab", b"", b"c", b""])
    dataset = Dataset.open(folder)
    changed: dict[str, Any] = {"batch_size": 1, "seq_len": seq_len}
    rows, state = read_world(dataset, 40, shuffle=False, **changed)
    one_pass = [256, 256, 97, 98, 256, 256, 99, 256, 256]
    found = rows[:, 1].flatten().tolist()
    assert found == (one_pass * len(found))[: len(found)]
    after, _ = read_world(dataset, 2, state=state, shuffle=False, **changed)
    assert after[:, 1].flatten().tolist() == (one_pass * len(found))[len(found) :][: 2 * seq_len]


def test_a_row_without_spans_is_padding() -> None:
    tokens, labels = pack_spans([], 3, 256)
    assert (tokens.tolist(), labels.tolist()) == ([256] * 4, [IGNORE_INDEX] * 3)


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=4), n_streams=st.integers(1, 20))
def test_mixing_keeps_to_the_weights(dataset: Dataset, weights: list[float], n_streams: int) -> None:
    sampler = make_sampler(Corpus([dataset] * len(weights), weights), batch_size=n_streams)
    counts = np.zeros(len(weights))
    due = np.array(weights) / sum(weights) * n_streams
    for step in range(300):
        of_step = np.bincount(sampler.pools_of_step(step), minlength=len(weights))
        assert (np.abs(of_step - due) < 1.0001).all()
        counts += of_step
    assert (np.abs(counts - 300 * due) < 8).all()


def test_every_row_gets_every_data_set(dataset: Dataset) -> None:
    sampler = make_sampler(Corpus([dataset, dataset], [1.0, 3.0]), batch_size=8)
    shares = np.mean([sampler.pools_of_step(step) for step in range(2000)], axis=0)
    assert (np.abs(shares - 0.75) < 0.05).all()


def test_bytes_of_a_token_are_those_of_the_mixture(dataset: Dataset, make_dataset: Callable[..., Dataset]) -> None:
    """A text of n bytes has n + 1 tokens."""
    short = make_dataset([(f"doc{n}", b"1234") for n in range(200)], heldout_fraction=0)
    long = make_dataset([(f"doc{n}", b"123456789") for n in range(10)], heldout_fraction=0)
    assert Corpus([short, long], [1.0, 3.0]).bytes_per_token == pytest.approx(0.25 * 0.8 + 0.75 * 0.9)
    n_short, n_long = (each.total("tokens", "train") for each in (short, long))
    pooled = (0.8 * n_short + 0.9 * n_long) / (n_short + n_long)
    assert Corpus([short, long]).bytes_per_token == pytest.approx(pooled)


def test_pooled_data_sets_are_read_whole(dataset: Dataset, make_dataset: Callable[..., Dataset]) -> None:
    other = make_dataset([(f"n{n}", b"number %d." % n) for n in range(50)])
    corpus = Corpus([dataset, other])
    sampler = make_sampler(corpus, batch_size=2)
    rows, _ = read_world(corpus, sampler.last_step(1), batch_size=2, passes=1)
    found = Counter(rows[:, 1].flatten().tolist())
    right = Counter(np.concatenate(documents_of(dataset) + documents_of(other)).tolist())
    assert found - Counter({-100: found[-100]}) == right


def test_finding_a_position_reads_no_more_after_a_thousand_passes(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts the indexes parsed and samples read for the first row after a resume."""
    reads: Counter[str] = Counter()
    read_index, read_sample = index_module.read_index, SampleReader.read
    monkeypatch.setattr(index_module, "read_index", lambda *args: reads.update(["index"]) or read_index(*args))
    monkeypatch.setattr(SampleReader, "read", lambda *args: reads.update(["sample"]) or read_sample(*args))
    _, state = read_world(dataset, 1)
    share = make_sampler(dataset).pools[0].n_units // 8
    for passes in (0, 1, 1000, 10**9):
        streams = {key: [value[0] + passes * share, value[1]] for key, value in state["streams"].items()}
        reads.clear()
        dataset._indexes._cached.clear()
        read_world(dataset, 1, state={**state, "streams": streams})
        assert reads["index"] <= 8
        assert reads["sample"] <= 8 * 16


def test_global_random_state_is_left_alone(dataset: Dataset) -> None:
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    before = (np.random.get_state()[1].tobytes(), random.getstate())  # noqa: NPY002
    rows, _ = read_world(dataset, 2)
    assert (np.random.get_state()[1].tobytes(), random.getstate()) == before  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert torch.equal(read_world(dataset, 2)[0], rows)
