"""Prefix states: kept, copied and dropped, with the texts that they give."""

from __future__ import annotations

import pytest
import torch

import reformer_dist
from reformer_dist.config import ModelConfig
from reformer_dist.errors import ConfigError
from reformer_dist.generation.decoder import CachedDecoder, PrefixDecoder
from reformer_dist.inference.continuation import Prompt, SampledTexts, encode_prompt, text_options
from reformer_dist.inference.prefixes import PrefixCache, PrefixState, check_prefixes, common_length, read_prefix
from reformer_dist.models import ReformerLM

DOCUMENT = "stone water " * 30
QUESTIONS = [" little", " time " * 9, ""]


@pytest.fixture(scope="module")
def loaded(endless):
    return reformer_dist.load(endless)._loaded


def texts_of(loaded, prompt: torch.Tensor, decoder: PrefixDecoder | None) -> list[str]:
    options = text_options(max_new_tokens=40, samples=2, seed=3)
    written, texts = ["", ""], SampledTexts(loaded, [prompt], options, decoder=decoder)
    while not texts.is_done:
        for step in texts.step():
            written[step.row] += step.text
    return written


def test_texts_from_a_kept_state_are_those_from_a_new_one_and_of_the_whole_prompt(loaded):
    prefix = encode_prompt(loaded, Prompt("prefix", DOCUMENT.encode()))
    kept = read_prefix(loaded, prefix)
    found = set()
    for question in (*QUESTIONS, *QUESTIONS):
        prompt = encode_prompt(loaded, Prompt("prompt", (DOCUMENT + question).encode()))
        rest = prompt[common_length(prompt, prefix) :]
        assert rest.numel() == len(question)
        again = texts_of(loaded, prompt, kept.continued(rest))
        assert again == texts_of(loaded, prompt, read_prefix(loaded, prefix).continued(rest))
        assert again == texts_of(loaded, prompt, None)
        found.add(tuple(again))
    assert len(found) == len(QUESTIONS)


@pytest.mark.parametrize("layers", [["lsh"], ["local"], ["exact"]])
def test_logits_after_a_prefix_match_those_of_a_forward(layers):
    config = ModelConfig(
        dim=32,
        n_layers=2,
        n_heads=2,
        layers=layers,
        n_buckets=4,
        window=16,
        local_window=16,
        qk_conv=3,
        n_hashes=2,
    )
    model = ReformerLM(config, 257).eval()
    tokens = torch.randint(0, 257, (1, 120), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        decoder = CachedDecoder(model, config)
        state = PrefixState(decoder, decoder.prefill(tokens[:, :90]))
        n_bytes = state.n_bytes
        for last in (120, 91, 90, 100):
            logits = state.continued(tokens[0, 90:last]).prefill(tokens[:, :last])
            torch.testing.assert_close(logits, model(tokens[:, :last])[:, -1], rtol=1e-5, atol=1e-5)
    assert state.n_bytes == n_bytes


def test_states_that_were_used_last_are_kept(loaded):
    documents = [torch.arange(100) + first for first in range(4)]
    states = [read_prefix(loaded, document) for document in documents]
    cache = PrefixCache(2 * states[0].n_bytes)
    cache.put(documents[0], states[0])
    cache.put(documents[1], states[1])
    assert cache.get(documents[0]) is states[0]
    cache.put(documents[2], states[2])
    assert cache.get(documents[1]) is None and cache.get(documents[0]) is states[0]
    assert cache.n_bytes == 2 * states[0].n_bytes
    small = PrefixCache(states[0].n_bytes - 1)
    small.put(documents[0], states[0])
    assert small.get(documents[0]) is None and small.n_bytes == 0


def test_models_without_a_cache_have_no_prefixes(endless):
    with pytest.raises(ConfigError, match=r"model\.neighbours=chunk"):
        check_prefixes(reformer_dist.load(endless, "model.neighbours=chunk", "model.next_value_heads=0")._loaded)
