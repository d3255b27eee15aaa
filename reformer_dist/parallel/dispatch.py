"""Token dispatch: packs what attention needs of each token, and builds a shard of the tokens received."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.distributed.comm import CommGroup, SplitRows
from reformer_dist.ops.lsh.attention import Shard
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.partition import Partition
from reformer_dist.parallel.exchange_plan import ExchangePlan, ReceivedMetadata, Route
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
    key_rows: Tensor | None = None
    """Indices of those that are keys here, if some are queries only; None: all."""

    def of_keys(self, x: Tensor) -> Tensor:
        """The rows [n_keys, D] of the keys in x [1, 1, L, D]."""
        return x[0, 0] if self.key_rows is None else x[0, 0, self.key_rows]


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
        if route.queries is not None:
            assert queries is not None
            return self._unpack_own_keys(route, route.queries, key_rows, queries)
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

    def _unpack_own_keys(
        self, route: Route, of_queries: ReceivedMetadata, key_rows: Tensor, queries: Tensor
    ) -> ReceivedTokens:
        """As `unpack`, where some tokens are queries only, and have another bucket as query than as key."""
        n_local, (n_heads, n_rounds, n_buckets) = self.plan.n_local, route.bucket_sizes.shape
        is_key, is_query = route.received.mask(n_local), route.received_queries.mask(n_local)
        source, head, token = rows = (is_key | is_query).nonzero(as_tuple=True)
        as_keys, as_queries = (mask[rows].nonzero().squeeze(1) for mask in (is_key, is_query))

        def expand(x: Tensor, index: Tensor, fill: int = 0) -> Tensor:
            expanded = x.new_full((len(token), *x.shape[1:]), fill)
            expanded[index] = x
            return expanded

        def sort_keys(ids: Tensor, index: Tensor) -> Tensor:
            return torch.stack(route.sort_keys(head, expand(ids, index, n_buckets))).unsqueeze(0)

        def codes(of_rows: Tensor | None, index: Tensor) -> Tensor | None:
            return None if of_rows is None or n_rounds == 1 else expand(of_rows.t(), index).t().contiguous()

        documents = None
        if route.document_ids is not None and of_queries.document_ids is not None:
            documents = expand(route.document_ids, as_keys)
            documents[as_queries] = of_queries.document_ids
        shard = Shard(
            sort_keys=sort_keys(route.bucket_ids, as_keys),
            query_sort_keys=sort_keys(of_queries.bucket_ids, as_queries),
            n_sort_keys=n_heads * n_buckets,
            head_index=self._head_index[route.heads][head],
            seq_len=self.plan.seq_len,
            positions=source * n_local + token,
            position_codes=codes(route.position_codes, as_keys),
            query_codes=codes(of_queries.position_codes, as_queries),
            bucket_sizes=route.bucket_sizes,
            partition=Partition(self.comm.index, self.comm.size),
            document_ids=None if documents is None else documents.unsqueeze(0),
        )
        k, v = (expand(self.key_format.field(key_rows, name), as_keys) for name in ("k", "v"))
        q, k, v = (as_one_head(x) for x in (expand(queries, as_queries), k, v))
        return ReceivedTokens(shard, as_queries, q, k, v, as_keys)


def as_one_head(rows: Tensor) -> Tensor:
    """[1, 1, L, ...] of rows [L, ...], contiguous."""
    return rows.contiguous().view(1, 1, *rows.shape)
