"""Synthetic recall tasks: each question has one answer, which the sequence determines."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reformer_dist.data import RawSample
from reformer_dist.data.prepare.needles import hide_needles, needle_samples
from reformer_dist.data.prepare.recall import induction, joint_recall, joint_recall_vocab_size, mqar
from reformer_dist.errors import DataError


def ids_of(sample: RawSample) -> list[int]:
    return [int(word) for word in sample.fields[0].split()]


def answers_of(sample: RawSample) -> list[int]:
    assert all(stop == start + 1 for start, stop in sample.label_spans)
    assert len(sample.label_groups) == len(sample.label_spans)
    return [start for start, _ in sample.label_spans]


@given(st.integers(1, 20), st.integers(0, 30), st.integers(0, 9))
@settings(max_examples=30)
def test_mqar(n_pairs: int, extra: int, seed: int) -> None:
    n_tokens = 4 * n_pairs + 2 * extra
    draw = np.random.default_rng(seed)
    [sample] = mqar(draw, 1, n_tokens=n_tokens, n_pairs=n_pairs, vocab_size=64, by_distance=True)
    ids, answers = ids_of(sample), answers_of(sample)
    assert len(ids) == n_tokens and max(ids) < 64 and answers == sorted(answers)
    pairs = dict(zip(ids[0 : 2 * n_pairs : 2], ids[1 : 2 * n_pairs : 2], strict=True))
    assert len(pairs) == n_pairs == len(set(pairs.values())) == len(answers)
    assert {ids[answer - 1] for answer in answers} == set(pairs)
    for answer, group in zip(answers, sample.label_groups, strict=True):
        key = ids[answer - 1]
        assert ids[answer] == pairs[key]
        assert [i for i, token in enumerate(ids) if token == key] == [ids.index(key), answer - 1]
        least = int(group.removeprefix("distance").rstrip("+").replace(",", ""))
        assert least <= answer - 1 - ids.index(key) < 2 * least


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_gaps_follow_the_power_law(power: float) -> None:
    samples = mqar(np.random.default_rng(0), 400, n_tokens=404, n_pairs=1, power=power)
    near = np.mean([answers_of(sample)[0] < 2 + 40 for sample in samples])
    weights = np.arange(1, 202) ** (power - 1)
    assert near == pytest.approx(weights[:20].sum() / weights.sum(), abs=0.08)


@given(st.integers(5, 7), st.integers(5, 7), st.integers(0, 9))
@settings(max_examples=20)
def test_joint_recall(n_contexts: int, n_keys: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    [sample] = joint_recall(draw, 1, n_contexts=n_contexts, n_keys=n_keys)
    ids, answers = ids_of(sample), answers_of(sample)
    assert ids[0] == 1 and max(ids) < joint_recall_vocab_size(n_contexts, n_keys)
    first_key, first_context, table, context = 26, 26 + n_keys, {}, 0
    asked = ids.index(4)
    for i in range(1, len(ids)):
        if ids[i] >= first_context:
            context = ids[i]
        elif ids[i - 1] >= first_key and ids[i - 1] < first_context:
            assert table.setdefault((context, ids[i - 1], i > asked), ids[i]) == ids[i]
    assert all(table[key[0], key[1], False] == value for key, value in table.items())
    assert len(answers) == len(table) / 2 and min(answers) > asked
    assert all(first_key <= ids[answer - 1] < first_context for answer in answers)


def test_induction() -> None:
    for sample in induction(np.random.default_rng(1), 20, n_tokens=12):
        ids = ids_of(sample)
        assert answers_of(sample) == [11] and len(ids) == 12
        assert ids.count(15) == 2 and ids[10] == 15 and ids[11] == ids[ids.index(15) + 1]


def test_needles() -> None:
    haystack = b"".join(b"line %d\n" % n for n in range(300))
    needles = hide_needles(np.random.default_rng(2), haystack, [0.9, 0.0, 0.5])
    text = needles.text.decode()
    sentences = re.findall(r"The number of (\w+) is (\d{6})\.", text)
    hidden, asked = dict(sentences[:3]), sentences[3:]
    assert len(hidden) == 3 and sorted(needles.depths) == [0.0, 0.5, 0.9]
    for (start, stop), depth, (name, number) in zip(needles.answers, needles.depths, asked, strict=True):
        assert text[start:stop] == number == hidden[name]
        place = text.index(f"The number of {name} is") / len(haystack)
        assert depth - 0.01 < place < depth + 0.05
    without = re.sub(r"(?m)^The number of .*\n", "", text[: text.index("\n\nThe number")] + "\n")
    assert without.encode() == haystack


def test_needle_samples_have_the_length_asked_for() -> None:
    text = b"".join(b"line %d\n" % n for n in range(3000))
    for sample in needle_samples(np.random.default_rng(2), text, 5, n_bytes=1024):
        assert 900 < len(sample.fields[0]) <= 1024
        assert {sample.fields[0][start:stop].isdigit() for start, stop in sample.label_spans} == {True}
        assert all(group.startswith("1,024 bytes, depth ") for group in sample.label_groups)


def test_impossible_sizes_are_refused() -> None:
    draw = np.random.default_rng(0)
    wrong = [
        lambda: mqar(draw, 1, n_tokens=10, n_pairs=3),
        lambda: mqar(draw, 1, n_tokens=13, n_pairs=3),
        lambda: mqar(draw, 1, n_tokens=16, n_pairs=4, vocab_size=9),
        lambda: joint_recall(draw, 1, n_contexts=4, n_keys=8),
        lambda: induction(draw, 1, n_tokens=3),
        lambda: needle_samples(draw, b"x" * 5000, 1, n_bytes=100),
        lambda: needle_samples(draw, b"x" * 500, 1, n_bytes=2000),
    ]
    for make in wrong:
        with pytest.raises(DataError, match=r"n_\w+=|vocab_size="):
            next(make())
