"""Text metrics, with their standard definitions."""

from __future__ import annotations

import gzip
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reformer_dist.errors import UserError

INSTALL = "pip install 'reformer_dist[tasks]'"
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = frozenset(string.punctuation)


def normalize_answer(text: str) -> str:
    """A text in lower case, without punctuation, articles and extra spaces, as in SQuAD's official evaluation."""
    plain = "".join(letter for letter in text.lower() if letter not in PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", plain).split())


def exact_match(answer: str, truth: str) -> float:
    """1 if the normalized answers are equal, else 0."""
    return float(normalize_answer(answer) == normalize_answer(truth))


def answer_f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall over the words of normalized answers, 0 to 1."""
    words, true_words = normalize_answer(answer).split(), normalize_answer(truth).split()
    n_same = sum((Counter(words) & Counter(true_words)).values())
    if n_same == 0:
        return 0.0
    precision, recall = n_same / len(words), n_same / len(true_words)
    return 2 * precision * recall / (precision + recall)


def max_over_answers(measure: Callable[[str, str], float], answer: str, truths: Sequence[str]) -> float:
    """The highest score over all true answers."""
    return max(measure(answer, truth) for truth in truths)


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """(corpus BLEU from 0 to 100, sacreBLEU's signature of how it was computed), with its defaults."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise UserError(f"BLEU needs the package sacrebleu: {INSTALL}") from error
    metric: Any = BLEU()
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return float(score), str(metric.get_signature())


def rouge(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, -2 and -L from 0 to 100, with stemming, from rouge-score."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError(f"ROUGE needs the package rouge-score: {INSTALL}") from error
    scorer: Any = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(truth, text) for text, truth in zip(hypotheses, references, strict=True)]
    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    return {
        shown: 100 * sum(score[name].fmeasure for score in scores) / len(scores) for name, shown in names.items()
    }


def order0_bits_per_byte(text: bytes) -> float:
    """Entropy of the byte frequencies of a text."""
    counts = np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256)
    frequencies = counts[counts > 0] / max(1, len(text))
    return float(-(frequencies * np.log2(frequencies)).sum())


def gzip_bits_per_byte(text: bytes) -> float:
    """Size after gzip -9."""
    return 8 * len(gzip.compress(text, compresslevel=9)) / max(1, len(text))
