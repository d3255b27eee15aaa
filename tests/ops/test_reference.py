"""The reference against loops over plain numbers that follow the definition literally."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import Case, cases, chunk_rules, run_oracle, window_rules
from torch import Tensor

from reformer_dist.ops.dropout import keep_mask, token_keys
from reformer_dist.ops.lsh import ChunkRule, WindowRule
from reformer_dist.ops.lsh.reference import visible_pairs

Meeting = tuple[int, int]
"""(round, key) that a query attends to."""


def window_meetings(ids: list[list[int]], real: list[bool], rule: WindowRule) -> list[list[Meeting]]:
    seq_len = len(real)
    meetings: list[list[Meeting]] = [[] for _ in range(seq_len)]
    for round_, bucket in enumerate(ids):
        for i in range(seq_len):
            members = [t for t in range(seq_len) if real[t] and bucket[t] == bucket[i]]
            for j in members if real[i] else []:
                distance = members.index(i) - members.index(j)
                in_time = distance >= 0 or not rule.causal
                if in_time and abs(distance) < rule.window and (rule.sees_self or i != j):
                    meetings[i].append((round_, j))
    return meetings


def chunk_meetings(ids: list[list[int]], real: list[bool], rule: ChunkRule) -> list[list[Meeting]]:
    seq_len = len(real)
    meetings: list[list[Meeting]] = [[] for _ in range(seq_len)]
    chunks_of: list[list[list[int]]] = []
    for bucket in ids:
        order = sorted(range(seq_len), key=lambda t: (not real[t], bucket[t], t))
        padded = math.ceil(seq_len / rule.round_to) * rule.round_to
        starts = range(0, padded, rule.chunk_len)
        chunks_of.append([order[start : start + rule.chunk_len] for start in starts])
    all_chunks = [chunk for chunks in chunks_of for chunk in chunks]
    n_chunks = len(chunks_of[0])
    for index, queries in enumerate(all_chunks):
        round_ = index // n_chunks
        for offset in range(-rule.n_before, rule.n_after + 1):
            if not rule.wrap and (index + offset < 0 or (index + offset) // n_chunks != round_):
                continue
            for j in all_chunks[(index + offset) % len(all_chunks)]:
                for i in queries:
                    if (
                        real[i]
                        and real[j]
                        and (j < i or (j > i and not rule.causal) or (j == i and rule.sees_self))
                    ):
                        meetings[i].append((round_, j))
    return meetings


def is_kept(case: Case, head: int, round_: int, i: int, j: int) -> bool:
    seed = case.options.dropout_seed
    query, key = (
        token_keys(torch.tensor([head]), torch.tensor([t]), round_, seed, is_query=t_is_query)
        for t, t_is_query in ((i, True), (j, False))
    )
    return bool(keep_mask(query, key, case.options.dropout))


def brute_force(case: Case, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(v)
    options, rule = case.options, case.options.rule
    for b in range(case.batch):
        real = [True] * case.seq_len if mask is None else mask[b].tolist()
        for h in range(case.n_heads):
            find = window_meetings if isinstance(rule, WindowRule) else chunk_meetings
            for i, meetings in enumerate(find(ids[b, h].tolist(), real, rule)):
                if not meetings:
                    out[b, h, i] = v[b, h, i]
                    continue
                total = 0.0
                for round_, j in meetings:
                    weight = math.exp(options.scale * float(q[b, h, i] @ k[b, h, j]))
                    if options.count_pairs_once:
                        weight /= sum(other == j for _, other in meetings)
                    total += weight
                    if options.dropout == 0 or is_kept(case, b * case.n_heads + h, round_, i, j):
                        out[b, h, i] += weight / (1 - options.dropout) * v[b, h, j]
                out[b, h, i] /= total
    return out


@settings(max_examples=80, deadline=None)
@given(cases(st.one_of(window_rules(), chunk_rules()), longest=12, n_hashes=3))
def test_reference_matches_the_definition(case: Case) -> None:
    q, k, v, ids, mask = case.tensors()
    found = run_oracle((q.double(), k.double(), v.double()), ids, case.options, mask)
    # dropout scales by a float32 factor
    torch.testing.assert_close(found, brute_force(case, q, k, v, ids, mask), atol=1e-6, rtol=1e-6)


def test_a_worked_example() -> None:
    """Tokens 0, 2, 3 share a bucket: with window 2, token 3 attends to token 2, and token 2 to token 0."""
    ids = torch.tensor([1, 0, 1, 1]).view(1, 1, 1, 4)
    meets = visible_pairs(ids, WindowRule(2, causal=True))[0, 0, 0]
    assert meets.nonzero().tolist() == [[2, 0], [3, 2]]
