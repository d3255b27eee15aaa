"""Sampling distributions, and independence of the rows of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_helpers import TableDecoder, random_table
from hypothesis import given
from hypothesis import strategies as st

from reformer_dist.config import AttentionKind, ModelConfig, NeighbourRule, Position
from reformer_dist.errors import ConfigError, UserError
from reformer_dist.generation import (
    CachedDecoder,
    SamplingOptions,
    TextSampler,
    UncachedDecoder,
    generate,
    make_decoder,
)
from reformer_dist.generation.sampling import next_probabilities
from reformer_dist.models import ReformerLM

LOGITS = torch.tensor([[1.0, 3.0, 2.0, -1.0, 0.5]])


def probabilities(penalized: list[bool] | None = None, logits: torch.Tensor = LOGITS, **given: Any) -> list[float]:
    options = SamplingOptions(**{"temperature": 1.0, **given})
    row = None if penalized is None else torch.tensor([penalized])
    return next_probabilities(logits, options, row)[0].tolist()


@pytest.mark.parametrize(("top_p", "kept"), [(0.74, 2), (0.75, 2), (0.76, 3), (0.875, 3), (0.88, 4)])
def test_a_token_that_completes_top_p_is_the_last(top_p: float, kept: int) -> None:
    """Of 1/2, 1/4, 1/8 and 1/8, whose sums are exact."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert sum(p > 0 for p in probabilities(logits=logits, top_p=top_p)) == kept


def test_by_hand() -> None:
    plain = LOGITS[0].softmax(0).tolist()
    assert probabilities() == pytest.approx(plain)
    assert probabilities(temperature=2.0) == pytest.approx((LOGITS[0] / 2).softmax(0).tolist())
    assert probabilities(temperature=0) == [0, 1, 0, 0, 0]
    two = plain[1] + plain[2]
    assert probabilities(top_k=2) == pytest.approx([0, plain[1] / two, plain[2] / two, 0, 0])
    # probabilities 0.61 and 0.22: the second is needed to reach 0.7, and the third for 0.9
    assert [p > 0 for p in probabilities(top_p=0.7)] == [False, True, True, False, False]
    assert [p > 0 for p in probabilities(top_p=0.9)] == [True, True, True, False, False]
    # top-k is first, and top-p counts the mass of its two tokens only
    assert [p > 0 for p in probabilities(top_k=2, top_p=0.7)] == [False, True, False, False, False]
    penalized = [False, True, False, True, False]
    changed = torch.tensor([1.0, 1.5, 2.0, -2.0, 0.5]).softmax(0).tolist()
    assert probabilities(penalized, repetition_penalty=2.0) == pytest.approx(changed)


@pytest.mark.parametrize(
    "given", [{"temperature": 1e-30}, {"top_k": 1}, {"top_p": 1e-30}, {"temperature": 1e-30, "top_k": 4}], ids=str
)
def test_the_extremes_are_greedy(given: dict[str, Any]) -> None:
    assert [p > 0 for p in probabilities(**given)] == [False, True, False, False, False]


def test_top_k_above_the_vocabulary_keeps_all() -> None:
    assert probabilities(top_k=99, top_p=1.0) == pytest.approx(LOGITS[0].softmax(0).tolist())
    # with ties, exactly k are kept
    assert sum(p > 0 for p in probabilities(logits=torch.zeros(1, 7), top_k=3)) == 3


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9),
    temperature=st.sampled_from([0.0, 1e-6, 0.7, 50.0]),
    top_k=st.integers(0, 10),
    top_p=st.floats(0.01, 1.0),
    penalty=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_something_can_always_be_drawn(
    logits: list[float], temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    options = SamplingOptions(temperature, top_k, top_p, penalty)
    row = torch.tensor([logits])
    found = next_probabilities(row, options, row > 0)
    assert bool(found.isfinite().all()) and bool((found >= 0).all()) and float(found.sum()) > 0
    if top_k:
        assert int((found > 0).sum()) <= top_k


def draw(
    prompts: list[list[int]], n_tokens: int, seed: int = 0, ended: dict[int, int] | None = None, **given: Any
):
    """Tokens by row; ended: number of tokens after which a row finishes."""
    decoder = TableDecoder(random_table(20, 5))
    options = SamplingOptions(temperature=1.0, seed=seed)
    sampler = TextSampler(decoder, [torch.tensor(prompt) for prompt in prompts], options, **given)
    found: dict[int, list[int]] = {row: [] for row in sampler.rows}
    for n in range(1, n_tokens + 1):
        for row, token in sampler.step().items():
            found[row].append(token)
        sampler.finish({row for row, last in (ended or {}).items() if last == n})
    return found, decoder.rows_decoded


def test_every_row_has_its_own_seed() -> None:
    found, _ = draw([[1, 2], [3]], 12, n_samples=2)
    assert len({tuple(tokens) for tokens in found.values()}) == 4
    assert found == draw([[1, 2], [3]], 12, n_samples=2)[0]
    other, _ = draw([[1, 2], [3]], 12, n_samples=2, seed=1)
    assert all(other[row] != found[row] for row in found)
    # independent of the number of samples, of the other prompts, and of when rows finish
    assert draw([[1, 2], [3]], 12, n_samples=1)[0] == {0: found[0], 1: found[2]}
    assert draw([[3]], 12, n_samples=2, first_prompt=1)[0] == {0: found[2], 1: found[3]}
    shorter, n_rows = draw([[1, 2], [3]], 12, n_samples=2, ended={1: 3, 2: 3, 0: 7})
    assert shorter == {0: found[0][:7], 1: found[1][:3], 2: found[2][:3], 3: found[3]}
    assert n_rows == [2, 4, 4, 2, 2, 2, 2, 1, 1, 1, 1, 1]


def test_draws_follow_their_probabilities() -> None:
    table = torch.tensor([[0.0, 1.0, 2.0]]).repeat(3, 1)
    sampler = TextSampler(
        TableDecoder(table), [torch.tensor([0])], SamplingOptions(temperature=1.0), n_samples=1500
    )
    counts = torch.bincount(torch.tensor(list(sampler.step().values())), minlength=3) / 1500
    torch.testing.assert_close(counts, table[0].softmax(0), atol=0.04, rtol=0)


def test_the_penalty_covers_prompt_and_text_but_not_the_end() -> None:
    """Greedy decoding with a huge penalty repeats no token."""
    table = torch.arange(6.0).repeat(6, 1) + 1
    options = SamplingOptions(temperature=0, repetition_penalty=1e6)
    sampler = TextSampler(TableDecoder(table), [torch.tensor([5, 4])], options)
    assert [sampler.step()[0] for _ in range(4)] == [3, 2, 1, 0]
    sampler = TextSampler(TableDecoder(table), [torch.tensor([5, 4])], options, unpenalized=5)
    assert [sampler.step()[0] for _ in range(2)] == [5, 5]


@pytest.mark.parametrize("neighbours", list(NeighbourRule))
def test_batched_sampling_matches_single_rows(neighbours: NeighbourRule) -> None:
    """With and without KV caches: prompts of different lengths, several samples, rows that finish early."""
    layers = [AttentionKind.lsh, AttentionKind.local, AttentionKind.exact]
    config = ModelConfig(
        dim=24, n_layers=3, n_heads=2, layers=layers, n_buckets=2, window=4, local_window=3, neighbours=neighbours
    )
    model = ReformerLM(config, 15).eval()
    decoder = make_decoder(model, config)
    assert isinstance(decoder, CachedDecoder if neighbours is NeighbourRule.window else UncachedDecoder)
    prompts = [torch.arange(3, 9), torch.tensor([2]), torch.arange(14, 4, -1)]
    options = SamplingOptions(temperature=1.0)
    sampler = TextSampler(decoder, prompts, options, n_samples=2)
    found: dict[int, list[int]] = {row: [] for row in sampler.rows}
    for n in range(10):
        for row, token in sampler.step().items():
            found[row].append(token)
        sampler.finish({0, 5} if n == 4 else set())
    for number, prompt in enumerate(prompts):
        alone = TextSampler(make_decoder(model, config), [prompt], options, n_samples=2, first_prompt=number)
        texts = [alone.step() for _ in range(10)]
        for sample in range(2):
            tokens = found[2 * number + sample]
            assert tokens == [text[sample] for text in texts][: len(tokens)]
    assert list(map(len, found.values())) == [5, 10, 10, 10, 10, 5]


@pytest.mark.parametrize("neighbours", list(NeighbourRule))
@pytest.mark.parametrize("lengths", [[25, 5, 9], [5, 25, 9]], ids=str)
def test_a_shorter_prompt_continues_to_the_last_position(neighbours: NeighbourRule, lengths: list[int]) -> None:
    """Rows finish at their own limits, the longest first; its padding does not limit the others."""
    config = ModelConfig(
        dim=16, n_layers=2, n_heads=2, n_buckets=2, window=4, neighbours=neighbours, chunk_len=4,
        position=Position.learned, max_seq_len=32,
    )  # fmt: skip
    model = ReformerLM(config, 15).eval()
    prompts = [torch.arange(length) % 15 for length in lengths]
    options = SamplingOptions(temperature=1.0)

    def texts(prompts: list[torch.Tensor], first: int) -> list[list[int]]:
        sampler = TextSampler(make_decoder(model, config), prompts, options, first_prompt=first)
        found: list[list[int]] = [[] for _ in prompts]
        while sampler.rows:
            for row, token in sampler.step().items():
                found[row].append(token)
            sampler.finish({row for row in sampler.rows if len(found[row]) == 32 - len(prompts[row])})
        return found

    together = texts(prompts, 0)
    assert [len(text) for text in together] == [32 - length for length in lengths]
    assert together == [texts([prompt], number)[0] for number, prompt in enumerate(prompts)]


def test_generate_yields_a_stream() -> None:
    tokens = list(generate(TableDecoder(random_table(20, 5)), torch.tensor([1, 2]), 9, SamplingOptions(seed=4)))
    assert len(tokens) == 9
    assert tokens[:5] == list(
        generate(TableDecoder(random_table(20, 5)), torch.tensor([1, 2]), 5, SamplingOptions(seed=4))
    )


def test_invalid_logits_and_models_are_refused() -> None:
    sampler = TextSampler(TableDecoder(torch.full((3, 3), torch.nan)), [torch.tensor([1])], SamplingOptions())
    with pytest.raises(UserError, match="not finite"):
        sampler.step()
    with pytest.raises(ConfigError, match=r"model\.causal=false"):
        make_decoder(lambda tokens: tokens, ModelConfig(causal=False))


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"temperature": -1.0}, "--temperature -1"),
        ({"top_k": -1}, "--top-k -1"),
        ({"top_p": 0.0}, "--top-p 0"),
        ({"top_p": 1.1}, "--top-p 1.1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0"),
    ],
    ids=str,
)
def test_invalid_options(given: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        SamplingOptions(**given)
