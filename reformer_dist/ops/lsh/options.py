"""Who sees whom in one round's order by (bucket, position): the two neighbour rules, and the options beside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    sees_self: bool = False
    """True (local attention): a token sees itself; False (shared query-key): only if it has nothing else."""
    round_to: int = 1
    """The order counts as padded to a multiple of this: who wraps, looks into the padding."""

    def n_chunks(self, seq_len: int) -> int:
        """Chunks of an order of seq_len tokens, empty ones of the padding included."""
        return -(-self.round_len(seq_len) // self.chunk_len)

    def round_len(self, seq_len: int) -> int:
        return -(-seq_len // self.round_to) * self.round_to


Rule = WindowRule | ChunkRule


@dataclass(frozen=True, kw_only=True)
class DropoutOptions:
    """Dropout of attention's weights: its masks are functions of row, head, round and positions."""

    dropout: float = 0.0
    dropout_seed: int = 0
    rows: Tensor | None = None
    """[B] numbers of the batch rows in their step; None: 0, 1, .."""
    first_head: int = 0
    """Number of the first head at hand among the layer's n_heads."""
    n_heads: int | None = None
    """Of the layer; None where all of them are at hand."""

    def head_indices(self, batch: int, n_heads: int, device: torch.device) -> Tensor:
        """Number in its step of each (batch row, head) at hand: [batch * n_heads]."""
        row = torch.arange(batch, device=device) if self.rows is None else self.rows
        head = torch.arange(n_heads, device=device) + self.first_head
        return (row.unsqueeze(1) * (self.n_heads or n_heads) + head).flatten()


@dataclass(frozen=True)
class AttentionOptions(DropoutOptions):
    """What stays fixed over the heads and rounds of one call."""

    rule: Rule
    n_buckets: int
    scale: float
    count_pairs_once: bool = False
    implementation: str = "auto"
    """auto, reference, torch, native or triton: see `ops.lsh.implementation`."""


@dataclass(frozen=True)
class CrossOptions(DropoutOptions):
    """The same for attention to another sequence, whose rule is that a query sees every key of its bucket."""

    n_buckets: int
    """1 and one round: exact attention."""
    scale: float
    count_pairs_once: bool = False
    is_reference: bool = False
    """Run the oracle."""
