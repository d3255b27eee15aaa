"""Metrics of texts in known cases."""

from __future__ import annotations

import sys

import pytest

from reformer_dist.errors import UserError
from reformer_dist.tasks.text_metrics import (
    answer_f1,
    bleu,
    exact_match,
    max_over_answers,
    normalize_answer,
    rouge,
)


def test_answers_are_normalized_as_by_squad() -> None:
    assert normalize_answer("The  Denver\tBroncos!") == "denver broncos"
    assert normalize_answer("an A.B. theory, a") == "ab theory"
    assert normalize_answer("Théâtre—L'été") == "théâtre—lété"  # only ASCII punctuation goes


@pytest.mark.parametrize(
    ("answer", "truth", "exact", "f1"),
    [
        ("Denver Broncos", "the Denver Broncos.", 1.0, 1.0),
        ("Denver", "Denver Broncos", 0.0, 2 / 3),
        ("in Denver in", "in in Denver Broncos", 0.0, 2 * 1.0 * 0.75 / 1.75),
        ("Carolina", "Denver Broncos", 0.0, 0.0),
        ("the", "the", 1.0, 0.0),  # the official script finds no common word in two empty answers
        ("", "Denver", 0.0, 0.0),
    ],
)
def test_exact_match_and_f1(answer: str, truth: str, exact: float, f1: float) -> None:
    assert exact_match(answer, truth) == exact
    assert answer_f1(answer, truth) == pytest.approx(f1)


def test_the_best_of_several_answers_counts() -> None:
    assert max_over_answers(answer_f1, "Denver", ["Denver Broncos", "Denver", "x"]) == 1.0


def test_bleu_and_its_signature() -> None:
    pytest.importorskip("sacrebleu")
    texts = ["A man in an orange hat starring at something .", "A dog runs over the green grass ."]
    score, signature = bleu(texts, texts)
    assert score == pytest.approx(100.0)
    assert "tok:13a" in signature and "version:" in signature and "case:mixed" in signature
    worse, _ = bleu([texts[0], "A cat sits ."], texts)
    assert 0 < worse < score


def test_rouge() -> None:
    pytest.importorskip("rouge_score")
    found = rouge(["the cat sat"], ["the cat ran"])
    assert found["ROUGE-1"] == pytest.approx(100 * 2 / 3)
    assert found["ROUGE-2"] == pytest.approx(50.0)
    assert found["ROUGE-L"] == pytest.approx(100 * 2 / 3)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sacrebleu", "sacrebleu.metrics", "rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"sacrebleu: pip install 'reformer_dist\[tasks\]'"):
        bleu(["a"], ["a"])
    with pytest.raises(UserError, match="rouge-score"):
        rouge(["a"], ["a"])
