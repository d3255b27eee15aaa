"""Attention rules of the LSH and local layers of a configuration."""

from __future__ import annotations

from dataclasses import dataclass

from reformer_dist.config import AttentionKind, ModelConfig, NeighbourRule
from reformer_dist.ops.lsh import ChunkRule, Rule, WindowRule


@dataclass(frozen=True)
class LayerRule:
    """Which keys the queries of a layer attend to, and in what sorted order."""

    rule: Rule
    n_rounds: int
    n_buckets: int
    """Buckets per round; with 1, the sorted order is that of positions."""
    shares_keys: bool
    """Keys are q / |q|."""
    own_buckets: bool = False
    """Keys are hashed apart from the queries: `AttentionOptions.own_keys`."""

    @staticmethod
    def of(config: ModelConfig, kind: AttentionKind) -> LayerRule:
        """kind: lsh or local."""
        wrap, multiple = config.compat.chunk_wrap, config.chunk_multiple
        rule: Rule
        if kind is AttentionKind.local:
            rule = WindowRule(config.local_window, config.causal, sees_self=True)
            if config.compat.local_chunk_len:
                before, after = config.compat.local_chunks_before, config.compat.local_chunks_after
                rule = ChunkRule(config.compat.local_chunk_len, config.causal, before, after, wrap, True, multiple)
            return LayerRule(rule, n_rounds=1, n_buckets=1, shares_keys=False)
        # with keys of their own, a token may attend to itself, unless its key has the value of its successor
        sees_self = not config.shared_qk and not (config.causal and config.next_value_heads > 0)
        rule = WindowRule(config.window, config.causal, sees_self)
        if config.neighbours is NeighbourRule.chunk:
            before, after = config.n_chunks_before, config.n_chunks_after
            rule = ChunkRule(config.chunk_len, config.causal, before, after, wrap, round_to=multiple)
        n_rounds, shared = config.n_hashes + config.local_round, config.shared_qk
        return LayerRule(rule, n_rounds, config.n_buckets, shares_keys=shared, own_buckets=not shared)
