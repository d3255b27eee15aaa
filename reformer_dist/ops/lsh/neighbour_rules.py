"""The window rule and the chunk rule of LSH attention: which tokens of a sorted order attend to each other.

Each backend enforces them in its `pair_mask`, the C library in attention.c.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reformer_dist.ops.checks import check_integer, check_type

LARGEST_WINDOW = 2**28  # sorted positions, and distances between them, are 32-bit


@dataclass(frozen=True)
class WindowRule:
    """A token attends to the members of its own bucket at a sorted distance below `window`.

    If causal, only to those not later than itself. The earlier members of a bucket do not depend on later tokens,
    so this rule is strictly causal, and token-by-token decoding matches the full forward.

    Keys with buckets of their own (`AttentionOptions.own_keys`): a query attends to the last `window` keys of its
    bucket up to its position; if not causal, also to the `window - 1` keys after those.
    """

    window: int
    causal: bool
    sees_self: bool = False
    """True (local attention): a token attends to itself. False (shared query-key): only if it has no other key.

    Keys with buckets of their own: whether the keys up to a query's position include that at the position itself.
    """

    def __post_init__(self) -> None:
        check_integer("window", self.window, least=1, most=LARGEST_WINDOW)
        check_type("causal", self.causal, bool)


@dataclass(frozen=True)
class ChunkRule:
    """The published code's rule: the order is cut into chunks, each attends to itself and its neighbour chunks.

    Chunk borders depend on the sizes of *all* buckets, future tokens included. With causal=True no token attends
    to a later one, but which earlier ones it attends to does depend on the future. Kept for models trained so.
    """

    chunk_len: int
    causal: bool
    n_before: int = 1
    n_after: int = 0
    wrap: bool = False
    """The first chunks of a round attend to the last ones of the previous round (the first round: of the last)."""
    sees_self: bool = False
    """True (local attention): a token attends to itself. False (shared query-key): only if it has no other key."""
    round_to: int = 1
    """The order counts as padded to a multiple of this, so chunks that wrap attend to the padding."""

    def __post_init__(self) -> None:
        check_integer("chunk_len", self.chunk_len, least=1, most=LARGEST_WINDOW)
        check_type("causal", self.causal, bool)
        check_integer("n_before", self.n_before, least=0)
        check_integer("n_after", self.n_after, least=0)
        check_integer("round_to", self.round_to, least=1, most=LARGEST_WINDOW)

    def n_chunks(self, seq_len: int) -> int:
        """Chunks in an order of seq_len tokens, including empty ones of the padding."""
        return -(-self.round_len(seq_len) // self.chunk_len)

    def round_len(self, seq_len: int) -> int:
        return -(-seq_len // self.round_to) * self.round_to


Rule = WindowRule | ChunkRule


def within_reach(query_codes: Tensor, key_codes: Tensor, rule: Rule) -> Tensor:
    """Whether the rule lets a query attend to a key in one round, from their position codes; broadcasts.

    Ignores padding, self-attention and, under the chunk rule, causality.
    """
    distance = query_codes - key_codes
    if isinstance(rule, ChunkRule):
        return (distance <= rule.n_before) & (distance >= -rule.n_after)
    return (distance >= 0) & (distance < rule.window) if rule.causal else distance.abs() < rule.window
