"""Synthetic tasks that measure recall: sequences of token ids in which only the answers are labels.

The answer follows its question in the sequence, so a causal language model is trained and evaluated on them as on
text. Each answer belongs to a group, whose accuracy is reported, such as its distance.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from reformer_dist.data.prepare.samples import RawSample
from reformer_dist.errors import DataError

POWER_LAW = 0.01  # exponent of zoology's gaps between context and questions
JOINT_BOS, JOINT_SEPARATOR, JOINT_FIRST = 1, 4, 10  # ids of the sequences of HAX
MIN_JOINT = 5  # contexts, and keys per context


def mqar(
    draw: np.random.Generator,
    n_samples: int,
    *,
    n_tokens: int,
    n_pairs: int,
    vocab_size: int = 8192,
    power: float = POWER_LAW,
    by_distance: bool = False,
) -> Iterator[RawSample]:
    """Multi-query associative recall (Arora et al., 2024): pairs of key and value, then each key once again.

    Keys are drawn from the lower half of the vocabulary and values from the upper half, without replacement. The
    questions stand at random even positions after the pairs, at distance d with a probability proportional to
    d**(power - 1); power=1 is uniform. All other tokens are random, and none of them is a key of the sequence, so
    that each question has one answer. Raises DataError if the sequence is too short or the vocabulary too small.

    by_distance: answers are grouped by their distance from the pair, in octaves, not by the shape of the task.
    """
    if 4 * n_pairs > n_tokens or n_tokens % 2 or n_pairs < 1:
        raise DataError(f"n_tokens={n_tokens}, n_pairs={n_pairs}: needs an even number, 4 per pair or more")
    if vocab_size < 2 * n_pairs + 2:
        raise DataError(f"vocab_size={vocab_size}: must be at least {2 * n_pairs + 2} for {n_pairs} pairs")
    n_slots = n_tokens // 2 - n_pairs
    weights = np.arange(1, n_slots + 1, dtype=np.float64) ** (power - 1)
    weights /= weights.sum()
    for number in range(n_samples):
        keys = draw.choice(np.arange(1, vocab_size // 2), n_pairs, replace=False)
        values = draw.choice(np.arange(vocab_size // 2, vocab_size), n_pairs, replace=False)
        ids = _other_tokens(draw, n_tokens, vocab_size, keys)
        slots = draw.choice(n_slots, n_pairs, replace=False, p=weights)
        positions = 2 * (n_pairs + slots)
        for first in (2 * np.arange(n_pairs), positions):
            ids[first], ids[first + 1] = keys, values
        order = np.argsort(positions)
        group = f"{n_tokens} tokens, {n_pairs} pairs"
        groups = [
            f"distance {1 << int(d).bit_length() - 1:>7,}+" for d in (positions - 2 * np.arange(n_pairs))[order]
        ]
        yield _sample(f"mqar:{number}", ids, positions[order] + 1, groups if by_distance else [group] * n_pairs)


def _other_tokens(
    draw: np.random.Generator, n_tokens: int, vocab_size: int, excluded: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Random ids [n_tokens] of a vocabulary without some of its ids."""
    ids = draw.integers(0, vocab_size - len(excluded), n_tokens)
    below = np.sort(excluded) - np.arange(len(excluded))  # for each excluded id, the ids left below it
    return ids + np.searchsorted(below, ids, side="right")


def joint_recall(
    draw: np.random.Generator, n_samples: int, *, n_contexts: int, n_keys: int, n_values: int = 16
) -> Iterator[RawSample]:
    """Joint recall (Yang et al., HAX, 2025): the value of a key depends on the context that it stands in.

    Each of the contexts lists its keys with their values in random order; after a separator, all contexts and keys
    follow once more, in another order. The numbers of contexts and keys are drawn from 5 to the maximum.
    """
    if min(n_contexts, n_keys) < MIN_JOINT:
        raise DataError(f"n_contexts={n_contexts}, n_keys={n_keys}: must be at least {MIN_JOINT}")
    first_key = JOINT_FIRST + n_values
    for number in range(n_samples):
        shape = int(draw.integers(MIN_JOINT, n_contexts + 1)), int(draw.integers(MIN_JOINT, n_keys + 1))
        values = JOINT_FIRST + draw.integers(0, n_values, shape)
        ids, answers = [JOINT_BOS], []
        for is_question in (False, True):
            for context in draw.permutation(shape[0]):
                ids.append(first_key + n_keys + int(context))
                for key in draw.permutation(shape[1]):
                    ids += [first_key + int(key), int(values[context, key])]
                    if is_question:
                        answers.append(len(ids) - 1)
            ids += [] if is_question else [JOINT_SEPARATOR]
        groups = [f"up to {n_contexts} contexts of {n_keys} keys"] * len(answers)
        yield _sample(f"joint_recall:{number}", np.array(ids), np.array(answers), groups)


def joint_recall_vocab_size(n_contexts: int, n_keys: int, n_values: int = 16) -> int:
    return JOINT_FIRST + n_values + n_keys + n_contexts


def induction(
    draw: np.random.Generator, n_samples: int, *, n_tokens: int, vocab_size: int = 16
) -> Iterator[RawSample]:
    """Induction (Olsson et al., 2022): the token that followed the one earlier occurrence of the second last.

    The last id of the vocabulary occurs twice: at a random place, and as the second last token.
    """
    if n_tokens < 4 or vocab_size < 3:
        raise DataError(f"n_tokens={n_tokens}, vocab_size={vocab_size}: must be at least 4 and 3")
    for number in range(n_samples):
        ids = draw.integers(0, vocab_size - 1, n_tokens)
        place = int(draw.integers(0, n_tokens - 3))
        ids[[place, -2]], ids[-1] = vocab_size - 1, ids[place + 1]
        yield _sample(f"induction:{number}", ids, np.array([n_tokens - 1]), [f"{n_tokens} tokens"])


def _sample(name: str, ids: NDArray[np.int64], answers: NDArray[np.int64], groups: list[str]) -> RawSample:
    """A sample of ids whose tokens at `answers`, in ascending order, are labels."""
    text = " ".join(map(str, ids.tolist())).encode()
    spans = tuple((int(answer), int(answer) + 1) for answer in answers)
    return RawSample(name, (text,), label_spans=spans, label_groups=tuple(groups))
