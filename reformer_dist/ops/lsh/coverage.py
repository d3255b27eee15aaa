"""How much of exact attention LSH attention finds: the share of its softmax mass that falls on pairs that meet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.lsh.options import AttentionOptions, ChunkRule
from reformer_dist.ops.lsh.sorting import within_reach, mark_padding, full_position_codes

QUERY_CHUNK = 256


@dataclass
class Coverage:
    """Sums over queries, so that those of several calls may be added."""

    mass: float = 0.0
    """Of each query, the share of exact attention's softmax that lies on keys that it meets in any round."""
    queries: int = 0
    pairs_met: int = 0
    pairs: int = 0

    def add(self, other: Coverage) -> None:
        self.mass += other.mass
        self.queries += other.queries
        self.pairs_met += other.pairs_met
        self.pairs += other.pairs

    def shares(self) -> dict[str, float]:
        """mass: mean over queries; pairs: share of pairs that meet, the mass that chance would find."""
        return {"mass": self.mass / max(1, self.queries), "pairs": self.pairs_met / max(1, self.pairs)}


@torch.no_grad()
def measure_coverage(
    q: Tensor,
    k: Tensor,
    bucket_ids: Tensor,
    options: AttentionOptions,
    key_padding_mask: Tensor | None = None,
) -> Coverage:
    """Compares the neighbourhoods of bucket ids [B, H, R, S] with exact attention of q, k [B, H, S, D].

    Exact attention is the softmax of scale * q.k over every real token but the query itself (if causal, every
    earlier one): what LSH attention would be if all shared one bucket and the window had no end. Queries that
    have no such key, and padding, are not counted. Time S^2, memory S * 256 for each (batch, head). Wrapped
    chunks are not measured: their neighbours lie in other rounds.
    """
    rule = options.rule
    assert not (isinstance(rule, ChunkRule) and rule.wrap)
    seq_len = q.shape[2]
    buckets = mark_padding(bucket_ids, options.n_buckets, key_padding_mask)
    codes = full_position_codes(buckets, options.n_buckets, rule)
    real = buckets[:, 0] != options.n_buckets
    queries, keys = q.flatten(0, 1).float(), k.flatten(0, 1).float()
    position = torch.arange(seq_len, device=q.device)
    found = Coverage()
    for start in range(0, seq_len, QUERY_CHUNK):
        some = slice(start, start + QUERY_CHUNK)
        row, column = position[some, None], position[None, :]
        in_time = column < row if rule.causal else column != row
        candidates = in_time & real[:, None, :] & real[:, some, None]
        near = torch.zeros_like(candidates)
        for round_codes in codes:
            near |= within_reach(round_codes[:, some, None], round_codes[:, None, :], rule)
        near &= candidates
        scores = options.scale * (queries[:, some] @ keys.transpose(1, 2))
        weights = scores.masked_fill(~candidates, -torch.inf).softmax(-1).masked_fill(~near, 0.0)
        has_any = candidates.any(-1)
        found.add(
            Coverage(
                weights.sum(-1)[has_any].double().sum().item(),
                int(has_any.sum()),
                int(near.sum()),
                int(candidates.sum()),
            )
        )
    return found
