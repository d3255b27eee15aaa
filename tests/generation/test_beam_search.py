"""Beam search against exhaustive search, and with against without KV caches."""

from __future__ import annotations

import itertools

import pytest
import torch
from generation_helpers import TableDecoder, random_table
from hypothesis import given
from hypothesis import strategies as st

from reformer_dist.config import AttentionKind, ModelConfig
from reformer_dist.errors import ConfigError, UserError
from reformer_dist.generation import BeamOptions, CachedDecoder, UncachedDecoder, beam_search
from reformer_dist.models import ReformerLM

EOS = 0


def ends(tokens: list[int]) -> bool:
    return tokens[-1] == EOS


def every_text(
    table: torch.Tensor, prompt: list[int], n_tokens: int, penalty: float
) -> dict[tuple[int, ...], float]:
    """Score of every text that ends with EOS, or has n_tokens tokens without one."""
    log_probabilities = table.log_softmax(-1).tolist()
    vocab_size = table.shape[0]
    scores = {}
    for length in range(1, n_tokens + 1):
        for text in itertools.product(range(vocab_size), repeat=length):
            if EOS in text[:-1] or (length < n_tokens and text[-1] != EOS):
                continue
            whole = [*prompt, *text]
            total = 0.0
            for place in range(len(prompt), len(whole)):
                total += log_probabilities[whole[place - 2]][whole[place - 1]][whole[place]]
            scores[text] = total / length**penalty
    return scores


@given(
    vocab_size=st.integers(2, 4),
    n_tokens=st.integers(1, 4),
    penalty=st.sampled_from([0.0, 0.6, 1.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_enough_beams_find_the_best_of_all_texts(
    vocab_size: int, n_tokens: int, penalty: float, seed: int
) -> None:
    table = random_table(vocab_size, seed, order=3)
    prompt = [1, 1]
    scores = every_text(table, prompt, n_tokens, penalty)
    options = BeamOptions(vocab_size**n_tokens, penalty)
    found = beam_search(TableDecoder(table), torch.tensor(prompt), n_tokens, options, ends)
    expected = sorted(scores.values(), reverse=True)
    assert [text.score for text in found] == pytest.approx(expected[: len(found)], abs=1e-5)
    assert len(found) == len(expected)
    for text in found:
        assert text.score == pytest.approx(scores[tuple(text.tokens)], abs=1e-5)


@given(beams=st.integers(1, 5), n_tokens=st.integers(1, 6), seed=st.integers(0, 1000))
def test_few_beams_keep_the_best_prefixes(beams: int, n_tokens: int, seed: int) -> None:
    """Against a naive beam search without early stopping."""
    table = random_table(5, seed, order=3)
    log_probabilities = table.log_softmax(-1)
    alive, over = [([1, 1], 0.0)], []
    for n in range(n_tokens):
        grown = [
            ([*text, token], total + float(log_probabilities[text[-2], text[-1], token]))
            for text, total in alive
            for token in range(5)
        ]
        grown.sort(key=lambda pair: -pair[1])
        alive = []
        for text, total in grown[: 2 * beams]:
            if text[-1] == EOS or n == n_tokens - 1:
                over.append((total / (n + 1), text[2:]))
            elif len(alive) < beams:
                alive.append((text, total))
    options = BeamOptions(beams, length_penalty=1.0)
    [best, *_] = beam_search(TableDecoder(table), torch.tensor([1, 1]), n_tokens, options, ends)
    assert (best.score, best.tokens) == (pytest.approx(max(over)[0], abs=1e-5), max(over)[1])


def test_one_beam_is_greedy() -> None:
    table = random_table(6, 3)
    [found] = beam_search(TableDecoder(table), torch.tensor([2]), 8, BeamOptions(1, 1.0), lambda tokens: False)
    token, greedy = 2, []
    for _ in range(8):
        token = int(table[token].argmax())
        greedy.append(token)
    assert found.tokens == greedy


def test_the_cache_follows_the_beams() -> None:
    """With a real model: when beams are reordered, their caches are too."""
    layers = [AttentionKind.lsh, AttentionKind.local, AttentionKind.exact]
    config = ModelConfig(dim=24, n_layers=3, n_heads=2, layers=layers, n_buckets=2, window=4, local_window=3)
    model = ReformerLM(config, 12).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)  # sharp enough that scores differ by more than rounding
    prompt = torch.randint(0, 12, (9,), generator=torch.Generator().manual_seed(0))
    options = BeamOptions(4, 1.0)
    plain = beam_search(UncachedDecoder(model), prompt, 12, options, ends)
    moves = []
    cached = CachedDecoder(model, config)
    select = cached.select_rows
    cached.select_rows = lambda rows: (moves.append(rows.tolist()), select(rows))[1]  # type: ignore[method-assign]
    found = beam_search(cached, prompt, 12, options, ends)
    assert [text.tokens for text in found] == [text.tokens for text in plain]
    assert [text.score for text in found] == pytest.approx([text.score for text in plain], abs=1e-4)
    assert any(sorted(rows) != rows or len(set(rows)) < 4 for rows in moves)


@pytest.mark.parametrize("worst", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [1, 0], ids=["at once", "later"])
def test_a_diverged_model_is_refused(worst: float, place: int) -> None:
    table = torch.tensor([[0.0, 1.0, 2.0], [9.0, 1.0, 2.0], [9.0, 1.0, 2.0]])
    table[place, 2] = worst
    with pytest.raises(UserError, match="not finite"):
        beam_search(TableDecoder(table), torch.tensor([1]), 4, BeamOptions(2), lambda tokens: False)


@pytest.mark.parametrize(("beams", "penalty", "key"), [(0, 1.0, "--beams 0"), (2, -0.5, "--length-penalty -0.5")])
def test_no_search_without_beams(beams: int, penalty: float, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        BeamOptions(beams, penalty)
