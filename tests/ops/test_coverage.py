"""Attention coverage against dense matrices: the pairs of the reference, and a softmax over all pairs."""

from __future__ import annotations

import pytest
import torch

from reformer_dist.ops.lsh import AttentionOptions, ChunkRule, Rule, WindowRule
from reformer_dist.ops.lsh import coverage as module
from reformer_dist.ops.lsh.coverage import Coverage, measure_coverage
from reformer_dist.ops.lsh.reference import visible_pairs
from reformer_dist.ops.lsh.shared_keys import shared_keys

BATCH, HEADS, SEQ_LEN, DIM, BUCKETS = 2, 3, 41, 8, 6
RULES = [
    WindowRule(5, causal=True),
    WindowRule(3, causal=False),
    WindowRule(100, causal=True),
    ChunkRule(7, causal=True),
    ChunkRule(5, causal=False, n_before=1, n_after=1),
]
OWN_KEYS = [WindowRule(5, causal=True, sees_self=True), WindowRule(3, causal=False, sees_self=True)]


def inputs(seed: int, rounds: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, HEADS, SEQ_LEN, DIM, generator=generator) * 2
    return q, shared_keys(q), torch.randint(BUCKETS, (BATCH, HEADS, rounds, SEQ_LEN), generator=generator)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rule", [*RULES, *OWN_KEYS], ids=str)
def test_against_dense_matrices(monkeypatch: pytest.MonkeyPatch, rule: Rule, padded: bool, seed: int) -> None:
    monkeypatch.setattr(module, "QUERY_CHUNK", 16)
    q, k, bucket_ids = inputs(seed, rounds=3)
    query_ids = bucket_ids.flip(-1) if rule.sees_self else None
    mask = torch.ones(BATCH, SEQ_LEN, dtype=torch.bool)
    if padded:
        mask[0, -9:] = False
    options = AttentionOptions(rule, BUCKETS, scale=1.5, own_keys=rule.sees_self)
    found = measure_coverage(q, k, bucket_ids, options, mask if padded else None, query_ids)

    met = visible_pairs(bucket_ids, rule, mask, query_ids).amax(2) > 0
    every = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool)
    candidates = every.tril() if rule.causal else every
    if not rule.sees_self:
        candidates = candidates & ~torch.eye(SEQ_LEN, dtype=torch.bool)
    candidates = (candidates & mask[:, None, :] & mask[:, :, None]).unsqueeze(1).expand_as(met)
    weights = (1.5 * q.double() @ k.double().transpose(-1, -2)).masked_fill(~candidates, -torch.inf).softmax(-1)
    counted = candidates.any(-1)
    expected = (counted, candidates, met & candidates)
    for sums, right in zip((found.queries, found.pairs, found.pairs_met), expected, strict=True):
        assert torch.equal(sums, right.double().transpose(0, 1).flatten(1).sum(1)) and sums.min() > 0
    covered = (weights * met).sum(-1).masked_fill(~counted, 0.0)
    torch.testing.assert_close(found.mass, covered.sum(dim=(0, 2)), rtol=1e-5, atol=0)

    # a sample of the queries
    sample = torch.tensor([3, 17, 40])
    some = measure_coverage(q, k, bucket_ids, options, mask if padded else None, query_ids, sample)
    torch.testing.assert_close(some.mass, covered[..., sample].sum(dim=(0, 2)), rtol=1e-5, atol=0)
    assert torch.equal(some.queries, counted[..., sample].double().sum(dim=(0, 2)))


@pytest.mark.parametrize("causal", [True, False])
def test_one_bucket_without_a_window_finds_everything(causal: bool) -> None:
    q, k, bucket_ids = inputs(0, rounds=1)
    options = AttentionOptions(WindowRule(SEQ_LEN, causal), 1, scale=1.0)
    fractions = measure_coverage(q, k, torch.zeros_like(bucket_ids), options).fractions()
    assert fractions == {"mass": pytest.approx(1.0, abs=1e-6), "pairs": 1.0}


def test_hashing_finds_more_than_chance() -> None:
    """The mass far exceeds the fraction of pairs if a bucket has similar vectors, but not with random ids."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(BUCKETS, DIM, generator=generator), dim=-1)
    kind = torch.randint(BUCKETS, (1, 1, 1, 200), generator=generator)
    q = 5 * centres[kind[:, :, 0]]
    options = AttentionOptions(WindowRule(200, causal=True), BUCKETS, scale=1.0)
    hashed = measure_coverage(q, shared_keys(q), kind, options).fractions()
    random_ids = kind[..., torch.randperm(200, generator=generator)]
    chance = measure_coverage(q, shared_keys(q), random_ids, options).fractions()
    assert hashed["mass"] > 2.5 * hashed["pairs"]
    assert chance["mass"] == pytest.approx(chance["pairs"], abs=0.08)


def test_coverages_add_up() -> None:
    total = Coverage()
    for number in (1, 2):
        total.add(Coverage(*(torch.tensor([x, 0.0]) for x in (0.5 * number, number, number, 4 * number))))
    assert total.by_head() == [{"mass": 0.5, "pairs": 0.25}, {"mass": 0.0, "pairs": 0.0}]
    assert total.fractions() == {"mass": 0.5, "pairs": 0.25}
    assert Coverage().fractions() == {"mass": 0.0, "pairs": 0.0}
