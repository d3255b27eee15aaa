"""Options of LSH and cross attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.ops.checks import (
    TensorChecks,
    check_choice,
    check_dropout,
    check_integer,
    check_number,
    check_type,
)
from reformer_dist.ops.lsh.neighbour_rules import LARGEST_WINDOW, ChunkRule, Rule

BACKENDS = ("auto", "reference", "torch", "native", "triton")
LARGEST_N_BUCKETS = 2**30


@dataclass(frozen=True, kw_only=True)
class DropoutOptions:
    """Dropout of attention weights. Masks are a function of batch row, head, round and positions."""

    dropout: float = 0.0
    dropout_seed: int = 0
    rows: Tensor | None = None
    """[B] indices of the batch rows within the step; None: 0, 1, ..."""
    first_head: int = 0
    """Index within the layer of the first local head."""
    n_heads: int | None = None
    """Heads of the layer; None if all are local."""

    def __post_init__(self) -> None:
        check_dropout("dropout", self.dropout)
        check_integer("dropout_seed", self.dropout_seed, least=-(2**63), most=2**64 - 1)
        check_integer("first_head", self.first_head, least=0)
        if self.n_heads is not None:
            check_integer("n_heads", self.n_heads, least=self.first_head + 1)

    def check_rows(self, checks: TensorChecks) -> None:
        """Raises ValueError unless rows has an element for each batch row, B of the checks."""
        if self.rows is not None:
            checks.integers("rows", self.rows, "B")

    def head_indices(self, batch: int, n_heads: int, device: torch.device) -> Tensor:
        """Index within the step of each local (batch row, head) pair: [batch * n_heads]."""
        row = torch.arange(batch, device=device) if self.rows is None else self.rows
        head = torch.arange(n_heads, device=device) + self.first_head
        return (row.unsqueeze(1) * (self.n_heads or n_heads) + head).flatten()


@dataclass(frozen=True)
class AttentionOptions(DropoutOptions):
    """Options shared by all heads and rounds of a call."""

    rule: Rule
    n_buckets: int
    scale: float
    count_pairs_once: bool = False
    next_value_heads: int = 0
    """Heads, from the first, with values of the next token (`next_values`); queries without keys then get 0."""
    backend: str = "auto"
    """auto, reference, torch, native or triton: see `ops.lsh.backends`."""
    own_keys: bool = False
    """Keys have bucket ids of their own: see `WindowRule`. Otherwise a token has one bucket, as query and key."""
    document_ids: Tensor | None = None
    """[B, S] integers that do not decrease along a row: a token attends to those of its own document only, as if
    each document were a sequence of its own. None: a row is one document."""

    @property
    def attends_alone(self) -> bool:
        """Whether a query that met no key attends to itself; else it gets 0.

        It gets 0 with values of the next token, and if its own key may be in another bucket.
        """
        return self.next_value_heads == 0 and not self.own_keys

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("n_buckets", self.n_buckets, least=1, most=LARGEST_N_BUCKETS)
        check_number("scale", self.scale, above=0)
        check_type("count_pairs_once", self.count_pairs_once, bool)
        check_integer("next_value_heads", self.next_value_heads, least=0)
        check_choice("backend", self.backend, BACKENDS)
        check_type("own_keys", self.own_keys, bool)
        if self.own_keys and isinstance(self.rule, ChunkRule):
            raise ValueError(
                "own_keys=True: needs a WindowRule; in chunks, a token has one bucket as query and key"
            )
        if self.own_keys and not self.rule.causal:  # a successor's value is then no secret
            if not self.rule.sees_self:
                raise ValueError("rule.sees_self=False: must be True with own_keys=True unless rule.causal=True")
        elif self.next_value_heads and self.rule.sees_self:
            raise ValueError(f"next_value_heads={self.next_value_heads}: needs rule.sees_self=False")
        if self.document_ids is not None and isinstance(self.rule, ChunkRule):
            raise ValueError(f"document_ids: need a WindowRule, not {self.rule}, whose chunks cross documents")
        if self.count_pairs_once:
            self._check_count_pairs_once()

    def _check_count_pairs_once(self) -> None:
        if isinstance(self.rule, ChunkRule):
            if self.rule.wrap:
                raise ValueError(
                    "count_pairs_once=True: needs rule.wrap=False; wrapped chunks have no position codes"
                )
        elif self.rule.window * self.n_buckets > LARGEST_WINDOW:  # buckets are a window apart
            limit = LARGEST_WINDOW // self.n_buckets
            condition = f"with n_buckets={self.n_buckets} and count_pairs_once=True"
            raise ValueError(f"window={self.rule.window}: must be at most {limit} {condition}")


@dataclass(frozen=True)
class CrossOptions(DropoutOptions):
    """Options of attention to another sequence, in which a query attends to every key of its bucket."""

    n_buckets: int
    """1, with one round: exact attention."""
    scale: float
    count_pairs_once: bool = False
    is_reference: bool = False
    """Use the reference implementation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("n_buckets", self.n_buckets, least=1, most=LARGEST_N_BUCKETS)
        check_number("scale", self.scale, above=0)
