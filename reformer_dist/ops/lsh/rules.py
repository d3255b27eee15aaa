"""Who sees whom in one round's order by (bucket, position): the two neighbour rules, and the options beside."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WindowRule:
    """A token sees the members of its own bucket at a sorted distance below `window`.

    Causal: only those not later than itself. A bucket's older members do not depend on what comes later, so
    this rule is strictly causal, and decoding one token at a time sees what the whole forward saw.
    """

    window: int
    causal: bool
    sees_self: bool = False
    """True (local attention): a token sees itself; False (shared query-key): only if it has nothing else."""


@dataclass(frozen=True)
class ChunkRule:
    """The published code's rule: the order is cut into chunks, each sees itself and its neighbour chunks.

    Chunk borders depend on how full *all* buckets are, future tokens included: with causal=True no token sees
    a later one, but which earlier ones it sees does depend on the future. Kept for models trained so.
    """

    chunk_len: int
    causal: bool
    n_before: int = 1
    n_after: int = 0
    wrap: bool = False
    """The first chunks of a round see the last ones of the round before it (the first round: of the last)."""


Rule = WindowRule | ChunkRule


@dataclass(frozen=True)
class AttentionOptions:
    """What stays fixed over the heads and rounds of one call."""

    rule: Rule
    n_buckets: int
    scale: float
    count_pairs_once: bool = False
    dropout: float = 0.0
    dropout_seed: int = 0
    first_row: int = 0
    """Number of the first batch row in its step: dropout masks are a function of row, head and positions."""
