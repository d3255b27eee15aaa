"""Token dispatch: packs what a token needs to be attended, and builds the shard of the rank that received it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.distributed.comm import CommGroup, SplitRows
from reformer_dist.ops.lsh.attention import Shard
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.parallel.exchange_plan import (
    ExchangePlan,
    ReceivedTokens,
    Route,
    received_shard,
    received_tokens,
)
from reformer_dist.parallel.row_format import RowFormat


@dataclass(frozen=True)
class Received:
    """The tokens that a rank received of a route, as a shard with its tensors [1, 1, L, D]."""

    tokens: ReceivedTokens
    shard: Shard
    q: Tensor
    k: Tensor | None
    """None for shared query-key attention."""
    v: Tensor


class TokenDispatcher:
    """Sends this rank's q, k, v [B, H, S, D], route by route, to the ranks that attend them."""

    def __init__(
        self,
        plan: ExchangePlan,
        options: AttentionOptions,
        comm: CommGroup,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
    ) -> None:
        """k is None for shared query-key attention: q is sent, and keys are computed from it where it arrives."""
        self.plan, self.comm = plan, comm
        self.q, self.k, self.v = q, k, v
        vector = (v.dtype, v.shape[3])
        self.keys = RowFormat(k=vector, v=vector)
        self.queries = RowFormat(q=vector)
        self._head_index = options.head_indices(v.shape[0], v.shape[1], v.device)

    @staticmethod
    def rows_of(x: Tensor, route: Route) -> Tensor:
        """A route's rows of x [B, H, S, width], as a view: [BH * S, width]."""
        return x.view(-1, *x.shape[2:])[route.heads].view(-1, x.shape[3])

    def pack(self, route: Route) -> list[SplitRows]:
        """Keys and values for every rank that needs them; separate queries for those that attend them."""
        parcels = [self.pack_keys(route)]
        if self.k is not None:
            parcels.append(self.pack_queries(route, self.queries, q=self.q))
        return parcels

    def pack_keys(self, route: Route) -> SplitRows:
        tokens = route.sent.tokens(self.plan.n_local)
        keys = self.q if self.k is None else self.k
        rows = self.keys.pack(k=self.rows_of(keys, route)[tokens], v=self.rows_of(self.v, route)[tokens])
        return SplitRows(rows, route.sent.splits, route.received.splits)

    def pack_queries(self, route: Route, record: RowFormat, **values: Tensor) -> SplitRows:
        """Fields [B, H, S, width] of the tokens that other ranks attend as queries."""
        tokens = route.sent_queries.tokens(self.plan.n_local)
        rows = record.pack(**{name: self.rows_of(value, route)[tokens] for name, value in values.items()})
        return SplitRows(rows, route.sent_queries.splits, route.received_queries.splits)

    def unpack(self, route: Route, key_rows: Tensor, query_rows: Tensor | None) -> Received:
        """The shard of the received rows; query_rows [queries, D] where queries are sent apart from keys."""
        tokens = received_tokens(route, self.plan)
        k, v = (self.keys.field(key_rows, name) for name in ("k", "v"))
        shard = received_shard(route, tokens, self.plan, self._head_index, self.comm)
        if query_rows is None:
            return Received(tokens, shard, as_heads(k), None, as_heads(v))
        q = torch.zeros_like(k)
        q[tokens.query_rows] = query_rows
        return Received(tokens, shard, as_heads(q), as_heads(k), as_heads(v))


def as_heads(rows: Tensor) -> Tensor:
    """[1, 1, L, ...] of rows [L, ...], contiguous."""
    return rows.contiguous().view(1, 1, *rows.shape)
