"""Token dispatch: packs what attention needs of each token, and builds a shard of the tokens received."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.distributed.comm import CommGroup, SplitRows
from reformer_dist.ops.lsh.attention import Shard
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.partition import Partition
from reformer_dist.parallel.exchange_plan import ExchangePlan, Route
from reformer_dist.parallel.row_format import RowFormat


@dataclass(frozen=True)
class ReceivedTokens:
    """The L tokens received of a route, in order of ranks, including this rank's own; tensors are [1, 1, L, D]."""

    shard: Shard
    query_rows: Tensor
    """Indices in [0, L) of those that are queries here in any round."""
    q: Tensor
    k: Tensor | None
    """None for shared query-key attention."""
    v: Tensor


class TokenDispatcher:
    """Sends this rank's q, k, v [B, H, S, D], route by route, to the ranks that attend to them."""

    def __init__(
        self,
        plan: ExchangePlan,
        options: AttentionOptions,
        comm: CommGroup,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
    ) -> None:
        """k is None for shared query-key attention: q is sent, and the receiver computes the keys from it."""
        self.plan, self.comm = plan, comm
        self.q, self.k, self.v = q, k, v
        vector = (v.dtype, v.shape[3])
        self.key_format, self.query_format = RowFormat(k=vector, v=vector), RowFormat(q=vector)
        self._head_index = options.head_indices(v.shape[0], v.shape[1], v.device)

    @staticmethod
    def rows_of(x: Tensor, route: Route) -> Tensor:
        """A route's rows of x [B, H, S, width], as a view: [BH * S, width]."""
        return x.view(-1, *x.shape[2:])[route.heads].view(-1, x.shape[3])

    def pack(self, route: Route) -> list[SplitRows]:
        """Keys and values for the ranks that need them; separate queries for those that attend from them."""
        messages = [self.pack_keys(route)]
        if self.k is not None:
            messages.append(self.pack_queries(route, self.query_format, q=self.q))
        return messages

    def pack_keys(self, route: Route) -> SplitRows:
        tokens = route.sent.tokens(self.plan.n_local)
        keys = self.q if self.k is None else self.k
        rows = self.key_format.pack(k=self.rows_of(keys, route)[tokens], v=self.rows_of(self.v, route)[tokens])
        return SplitRows(rows, route.sent.splits, route.received.splits)

    def pack_queries(self, route: Route, row_format: RowFormat, **fields: Tensor) -> SplitRows:
        """Fields [B, H, S, width] of the tokens that other ranks attend from."""
        tokens = route.sent_queries.tokens(self.plan.n_local)
        rows = row_format.pack(**{name: self.rows_of(x, route)[tokens] for name, x in fields.items()})
        return SplitRows(rows, route.sent_queries.splits, route.received_queries.splits)

    def unpack(self, route: Route, key_rows: Tensor, queries: Tensor | None) -> ReceivedTokens:
        """The received tokens, from rows in key_format; queries [n_queries, D] unless keys are shared."""
        n_local, (n_heads, n_rounds, n_buckets) = self.plan.n_local, route.bucket_sizes.shape
        source, head, token = route.received.mask(n_local).nonzero(as_tuple=True)
        query_rows = route.received_queries.mask(n_local)[source, head, token].nonzero().squeeze(1)
        shard = Shard(
            sort_keys=torch.stack(route.sort_keys(head)).unsqueeze(0),
            n_sort_keys=n_heads * n_buckets,
            head_index=self._head_index[route.heads][head],
            seq_len=self.plan.seq_len,
            positions=source * n_local + token,
            position_codes=route.position_codes if n_rounds > 1 else None,
            bucket_sizes=route.bucket_sizes,
            partition=Partition(self.comm.index, self.comm.size),
            document_ids=None if route.document_ids is None else route.document_ids.unsqueeze(0),
        )
        k, v = (self.key_format.field(key_rows, name) for name in ("k", "v"))
        if queries is None:
            return ReceivedTokens(shard, query_rows, as_one_head(k), None, as_one_head(v))
        q = torch.zeros_like(k)
        q[query_rows] = queries
        return ReceivedTokens(shard, query_rows, as_one_head(q), as_one_head(k), as_one_head(v))


def as_one_head(rows: Tensor) -> Tensor:
    """[1, 1, L, ...] of rows [L, ...], contiguous."""
    return rows.contiguous().view(1, 1, *rows.shape)
