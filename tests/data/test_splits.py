"""Which samples are held out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reformer_dist.data import (
    ByteTokenizer,
    Dataset,
    RawSample,
    assign_splits,
    is_heldout,
    read_text,
    sample_texts,
    write_samples,
)
from reformer_dist.data.prepare.samples import divide
from reformer_dist.errors import DataError

TEXTS = st.lists(st.binary(min_size=2, max_size=3), min_size=1, max_size=6)


def assigned(texts: list[bytes], fraction: float) -> dict[str, list[bytes]]:
    samples = [RawSample(f"doc{n}", (text,)) for n, text in enumerate(texts)]
    found: dict[str, list[bytes]] = {"train": [], "heldout": []}
    for split, sample in assign_splits(samples, None, fraction):
        found[split].append(sample.fields[0])
    return found


@given(texts=TEXTS, fraction=st.sampled_from([1e-9, 0.05, 0.3, 0.7, 1 - 1e-9]))
def test_no_split_stays_empty(texts: list[bytes], fraction: float) -> None:
    found = assigned(texts, fraction)
    train, heldout = found["train"], found["heldout"]
    assert train and heldout
    if len(set(texts)) > 1:
        assert sorted(train + heldout) == sorted(texts) and not set(train) & set(heldout)
        moved = [
            text
            for split in found
            for text in set(found[split])
            if is_heldout(text, fraction) != (split == "heldout")
        ]
        assert len(moved) <= 1  # and only if the split would be empty
        assert not moved or len(set(heldout)) == 1 or len(set(train)) == 1
    else:
        assert {a + b for a, b in zip(train, heldout, strict=True)} == set(texts)
    shuffled = random.Random(0).sample(texts, len(texts))
    assert {split: sorted(each) for split, each in assigned(shuffled, fraction).items()} == {
        split: sorted(each) for split, each in found.items()
    }


def test_nothing_is_moved_without_need() -> None:
    assert assigned([b"one", b"two"], 0.0)["heldout"] == []
    given = [RawSample("x", (b"x",))]
    assert list(assign_splits(given, [], 0.5)) == [("train", given[0])]
    texts = [b"%d" % number for number in range(100)]
    assert assigned(texts, 0.2)["heldout"] == [text for text in texts if is_heldout(text, 0.2)]
    empty = [RawSample("a", (b"",)), RawSample("b", (b"text", b"")), RawSample("c", (b"text", b"x"))]
    assert {split for split, sample in assign_splits(empty, None, 0.5) if all(sample.fields)} < {
        "train",
        "heldout",
    }


def test_groups_stay_together() -> None:
    """Questions on one context, for instance, also if one of the contexts must be moved."""
    for key in (b"one", b"two"):
        samples = [RawSample(f"{n}", (b"%d" % n, b"x"), split_key=[key, b"other"][n % 2]) for n in range(20)]
        for fraction in (1e-9, 0.3, 1 - 1e-9):
            found = {(split, sample.split_key) for split, sample in assign_splits(samples, None, fraction)}
            assert len(found) == 2 and len({split for split, _ in found}) == 2


@pytest.mark.parametrize("mark", ["\n\n", "\r\n\r\n", "\n", " ", "", "é"])
def test_the_end_of_a_text_is_held_out(mark: str) -> None:
    text = ("word" * 20 + mark).encode() * 200
    parts = divide(RawSample("book", (text,), is_divisible=True), 0.1)
    assert parts is not None
    (head,), (tail,) = parts[0].fields, parts[1].fields
    assert head + tail == text and 0.09 < len(tail) / len(text) < 0.16
    assert head.decode() and tail.decode()
    assert mark.strip() or not mark or head.endswith(mark.encode())
    for kept in (
        RawSample("a", (b"x",)),
        RawSample("a", (text, text)),
        RawSample("a", (text,), {"label": "x"}),
        RawSample("a", (text,), label_spans=((0, 1),)),
    ):
        assert divide(kept, 0.1) is None


def test_files_given_by_themselves_are_divided(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(f"line of {name}\n".encode() * 100)
    found = list(assign_splits(read_text([tmp_path / name for name in "abc"]), None, 0.1))
    assert [(split, sample.name) for split, sample in found] == [
        (split, name + end) for name in "abc" for split, end in (("train", ""), ("heldout", " (end)"))
    ]
    # files of a folder are whole, except a single one
    found = list(assign_splits(read_text([tmp_path]), None, 0.1))
    assert len(found) == 3 and {split for split, _ in found} == {"train", "heldout"}
    for name in "ab":
        (tmp_path / name).unlink()
    assert len(list(assign_splits(read_text([tmp_path]), None, 0.1))) == 2


def test_few_documents_make_a_dataset(tmp_path: Path) -> None:
    for n_documents in (1, 2, 3, 16):
        samples = [RawSample(f"{n}", (b"text %d " % n * 50,)) for n in range(n_documents)]
        for fraction in (0.001, 0.1, 0.999):
            write_samples(samples, tmp_path, ByteTokenizer(), heldout_fraction=fraction, overwrite=True)
            dataset = Dataset.open(tmp_path)
            assert dataset.total("text_bytes", "train") and dataset.total("text_bytes", "heldout")
    with pytest.raises(DataError, match=r"no document of 1 .*held out"):
        write_samples([RawSample("a", (b"one", b"two"))], tmp_path / "d", ByteTokenizer(), fields=("a", "b"))


def test_texts_for_a_vocabulary_are_bounded() -> None:
    texts = [b"%d" % number * 10 for number in range(200)]
    total = sum(map(len, texts))
    assert sample_texts(texts, total) == texts
    found = sample_texts(texts, total // 2)
    assert total // 2 - 60 < sum(map(len, found)) <= total // 2
    assert found == [text for text in texts if text in found]
    shuffled = random.Random(0).sample(texts, len(texts))
    assert sorted(sample_texts(shuffled, total // 2)) == sorted(found)
    assert sample_texts([b"long" * 10], 9) == [b"longlongl"]
