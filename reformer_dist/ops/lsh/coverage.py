"""Coverage of LSH attention: the fraction of exact attention's softmax mass on the pairs that LSH attends to."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from reformer_dist.ops.checks import TensorChecks, check_range
from reformer_dist.ops.lsh.attention import LocalExchange
from reformer_dist.ops.lsh.neighbour_rules import ChunkRule, WindowRule, within_reach
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.sorting import full_position_codes, full_query_codes, mark_padding

QUERY_CHUNK = 256


def _zero() -> Tensor:
    return torch.zeros(1, dtype=torch.float64, device="cpu")


@dataclass
class Coverage:
    """Sums over the queries of each head, [H] float64; those of several calls can be added."""

    mass: Tensor = field(default_factory=_zero)
    """Exact softmax mass on the keys that a query attends to in any round."""
    queries: Tensor = field(default_factory=_zero)
    pairs_met: Tensor = field(default_factory=_zero)
    pairs: Tensor = field(default_factory=_zero)

    def add(self, other: Coverage) -> None:
        self.mass = self.mass + other.mass
        self.queries = self.queries + other.queries
        self.pairs_met = self.pairs_met + other.pairs_met
        self.pairs = self.pairs + other.pairs

    def fractions(self) -> dict[str, float]:
        """mass: mean over queries; pairs: fraction of pairs attended, which is the mass expected by chance."""
        mass, queries, met, pairs = (x.sum().item() for x in (self.mass, self.queries, self.pairs_met, self.pairs))
        return {"mass": mass / max(1, queries), "pairs": met / max(1, pairs)}

    def by_head(self) -> list[dict[str, float]]:
        """The fractions of each head."""
        sums = (self.mass, self.queries, self.pairs_met, self.pairs)
        return [Coverage(*each).fractions() for each in zip(*sums, strict=True)]


@torch.no_grad()
def measure_coverage(
    q: Tensor,
    k: Tensor,
    bucket_ids: Tensor,
    options: AttentionOptions,
    key_padding_mask: Tensor | None = None,
    query_ids: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> Coverage:
    """Compares the neighbourhoods of bucket ids [B, H, R, S] with exact attention of q, k [B, H, S, D].

    Exact attention is the softmax of scale * q.k over every real token but the query itself (if causal, every
    earlier one): LSH attention with a single bucket and an unlimited window. With keys of their own, whose
    queries' buckets are query_ids, the query itself is one of them. Queries without such a key, and padding, are
    not counted. query_positions: int64 [Q], a sample of the queries to measure; None: all. Time S * Q and memory
    S * QUERY_CHUNK per (batch row, head). Wrapped chunks are not supported, since their neighbours are in other
    rounds. Raises ValueError.
    """
    rule = options.rule
    if isinstance(rule, ChunkRule) and rule.wrap:
        raise ValueError("rule.wrap=True: coverage is not defined for wrapped chunks; must be False")
    LocalExchange(bucket_ids, options, key_padding_mask, query_ids).check(q, k, q)
    check_range("bucket_ids", bucket_ids, options.n_buckets, limit="n_buckets")
    n_heads, seq_len = q.shape[1:3]
    buckets = mark_padding(bucket_ids, options.n_buckets, key_padding_mask)
    codes = query_codes = full_position_codes(buckets, options.n_buckets, rule)
    if query_ids is not None and isinstance(rule, WindowRule):
        queries_at = mark_padding(query_ids, options.n_buckets, key_padding_mask)
        query_codes = full_query_codes(queries_at, buckets, options.n_buckets, rule)
    real = buckets[:, 0] != options.n_buckets
    queries, keys = q.flatten(0, 1).float(), k.flatten(0, 1).float()
    position = torch.arange(seq_len, device=q.device)
    total = Coverage()
    if query_positions is not None:
        TensorChecks().integers("query_positions", query_positions, "Q")
        check_range("query_positions", query_positions, seq_len, limit="S")
    for chunk in (position if query_positions is None else query_positions.to(q.device)).split(QUERY_CHUNK):
        row, column = position[chunk, None], position[None, :]
        visible = column <= row if rule.causal else column == column
        if not rule.sees_self:
            visible = visible & (column != row)
        candidates = visible & real[:, None, :] & real[:, chunk, None]
        if (documents := options.document_ids) is not None:
            same_document = documents[:, chunk, None] == documents[:, None, :]
            candidates &= same_document.repeat_interleave(n_heads, dim=0)
        attended = torch.zeros_like(candidates)
        for of_queries, of_keys in zip(query_codes, codes, strict=True):
            attended |= within_reach(of_queries[:, chunk, None], of_keys[:, None, :], rule)
        attended &= candidates
        scores = options.scale * (queries[:, chunk] @ keys.transpose(1, 2))
        weights = scores.masked_fill(~candidates, -torch.inf).softmax(-1).masked_fill(~attended, 0.0)
        has_candidate = candidates.any(-1)
        mass = weights.sum(-1).masked_fill(~has_candidate, 0.0)
        sums = (mass, has_candidate, attended.sum(-1), candidates.sum(-1))
        total.add(Coverage(*(x.double().view(-1, n_heads, len(chunk)).sum(dim=(0, 2)).cpu() for x in sums)))
    return total
