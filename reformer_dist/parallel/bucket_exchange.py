"""LSH bucket exchange: the tokens of a sequence that lies on several ranks travel to the ranks of their buckets.

Group by group of heads, a token's vectors are sent to each rank that attends it or needs it as a key, in one
message (dispatch). There the tokens are a shard like any other (`ops.lsh.attention`), and their partial softmax is
sent back and merged (combine). While one group is attended, the next one travels.

The backward sends the same tokens again, with dO, the logsumexp and rowsum(dO * o), and gets gradients back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reformer_dist.distributed.comm import CommGroup, SplitRows, Work
from reformer_dist.errors import TrainingError
from reformer_dist.ops.lsh.attention import Backward, Forward, Sorter, attend
from reformer_dist.ops.lsh.backends import backend_for
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.torch_tiles.attention import TorchBackend
from reformer_dist.parallel.combine import Combiner, MergedCombiner, RoundCombiner
from reformer_dist.parallel.dispatch import TokenDispatcher, as_heads
from reformer_dist.parallel.exchange_plan import ExchangePlan, Route, Selection
from reformer_dist.parallel.row_format import RowFormat


class BucketExchange:
    """`ops.lsh.attention.Exchange` among the ranks that made a plan together."""

    def __init__(
        self, plan: ExchangePlan, options: AttentionOptions, comm: CommGroup, *, per_round: bool = False
    ) -> None:
        """per_round: rounds are combined one by one, which in float32 is bitwise the result of one rank.

        Otherwise partial results of a token whose rounds are attended on the same rank are merged there, which
        saves bytes. per_round needs the `torch` backend.
        """
        self.plan, self.comm, self.per_round, self.options = plan, comm, per_round, options

    def forward(self, tensors: Forward, sorter: Sorter) -> None:
        dispatcher = TokenDispatcher(self.plan, self.options, self.comm, tensors.q, tensors.k, tensors.v)
        combiner: Combiner = (RoundCombiner if self.per_round else MergedCombiner)(dispatcher)
        lses = tensors.lse.unsqueeze(3)

        def attend(route: Route, arrived: list[Tensor]) -> list[SplitRows]:
            query_rows = None if tensors.k is None else dispatcher.queries.field(arrived[1], "q")
            received = dispatcher.unpack(route, arrived[0], query_rows)
            return [combiner.attend(route, received, sorter)]

        def merge(route: Route, results: list[Tensor]) -> None:
            o, lse = combiner.merge(route, results[0]).output()
            dispatcher.rows_of(tensors.out, route).copy_(o)
            dispatcher.rows_of(lses, route).copy_(lse.unsqueeze(1))

        self._run(dispatcher.pack, attend, merge)

    def backward(self, tensors: Backward, sorter: Sorter) -> None:
        tensors = tensors._replace(d_out=tensors.d_out.contiguous())
        dispatcher = TokenDispatcher(self.plan, self.options, self.comm, tensors.q, tensors.k, tensors.v)
        call = _Backward(dispatcher, tensors, sorter)
        self._run(call.pack, call.attend, call.add_gradients)

    def _run(
        self,
        pack: Callable[[Route], list[SplitRows]],
        attend: Callable[[Route, list[Tensor]], list[SplitRows]],
        finish: Callable[[Route, list[Tensor]], None],
    ) -> None:
        """Each route is dispatched, attended and combined; the next one travels while this one is attended."""
        self._check_same_plan()
        routes, comm = self.plan.routes, self.comm
        timed = comm.stats.timed
        dispatched: list[Work] = []
        returned: list[Work] = []
        # two more turns: what is dispatched at one is attended at the next, and combined at the one after that
        for turn in range(len(routes) + 2):
            with timed("exchange"):
                arrived = [delivery.wait() for delivery in dispatched]
                parcels = pack(routes[turn]) if turn < len(routes) else []
                dispatched = [comm.all_to_all_v(parcel, "exchange") for parcel in parcels]
            with timed("attend"):
                results = attend(routes[turn - 1], arrived) if arrived else []
            with timed("return"):
                combined = [delivery.wait() for delivery in returned]
                returned = [comm.all_to_all_v(parcel, "return") for parcel in results]
                if combined:
                    finish(routes[turn - 2], combined)

    def _check_same_plan(self) -> None:
        """All ranks are about to exchange by plans that match, or all of them raise TrainingError."""
        checksum = torch.tensor([self.plan.checksum], device=self.plan.routes[0].bucket_ids.device)
        difference = int(self.comm.all_reduce(checksum, "count"))
        if difference:
            raise TrainingError(
                f"bucket exchange: the plans of the ranks do not match (checksums sum to {difference}, not 0); "
                "the ranks of a sequence are not at the same layer of the same step"
            )


def exchanged_attention(q: Tensor, k: Tensor | None, v: Tensor, exchange: BucketExchange) -> Tensor:
    """What `bucket_attention` computes for the whole sequence, of which this rank has q, k, v [B, H, S, D]."""
    q, v, k = q.contiguous(), v.contiguous(), None if k is None else k.contiguous()
    backend = TorchBackend if exchange.per_round else backend_for(exchange.options, v, partitioned=True)
    return attend(q, k, v, exchange, backend)


class _Backward:
    """What travels in the backward, and the gradients of this rank's tokens."""

    def __init__(self, dispatcher: TokenDispatcher, tensors: Backward, sorter: Sorter) -> None:
        self._dispatcher, self._tensors, self._sorter = dispatcher, tensors, sorter
        vector, number = (tensors.d_out.dtype, tensors.d_out.shape[3]), (torch.float32, 1)
        self._has_keys = tensors.k is not None
        self._queries = RowFormat(d_out=vector, lse=number, delta=number, **({"q": vector} if self._has_keys else {}))
        self._grads = dispatcher.keys

    def pack(self, route: Route) -> list[SplitRows]:
        tensors = self._tensors
        values = {"d_out": tensors.d_out, "lse": tensors.lse.unsqueeze(3), "delta": tensors.delta.unsqueeze(3)}
        if self._has_keys:
            values["q"] = tensors.q
        return [self._dispatcher.pack_keys(route), self._dispatcher.pack_queries(route, self._queries, **values)]

    def attend(self, route: Route, arrived: list[Tensor]) -> list[SplitRows]:
        query_rows = self._queries.field(arrived[1], "q") if self._has_keys else None
        received = self._dispatcher.unpack(route, arrived[0], query_rows)
        rows, v = received.tokens.query_rows, received.v[0, 0]
        d_out = torch.zeros_like(v)
        # lse = inf silences rows that are no queries here, as it does queries that met no key anywhere
        lse = torch.full((len(v),), torch.inf, device=v.device)
        delta = torch.zeros_like(lse)
        for target, name in ((d_out, "d_out"), (lse, "lse"), (delta, "delta")):
            target[rows] = self._queries.field(arrived[1], name).view(-1, *target.shape[1:])
        q, k, v = received.q, received.k, received.v
        dq, dv = torch.zeros_like(q), torch.zeros_like(v)
        dk = None if k is None else torch.zeros_like(k)
        lse, delta = as_heads(lse), as_heads(delta)
        order = self._sorter.sort(received.shard)
        order.attend_backward(Backward(q, k, v, as_heads(d_out), lse, delta, dq, dk, dv))
        of_keys = self._grads.pack(k=(dq if dk is None else dk)[0, 0], v=dv[0, 0])
        grads = SplitRows(of_keys, route.received.splits, route.sent.splits)
        if not self._has_keys:
            return [grads]
        of_queries = self._dispatcher.queries.pack(q=dq[0, 0, rows])
        return [grads, SplitRows(of_queries, route.received_queries.splits, route.sent_queries.splits)]

    def add_gradients(self, route: Route, results: list[Tensor]) -> None:
        tensors = self._tensors
        of_keys = tensors.dq if tensors.dk is None else tensors.dk
        for target, name in ((of_keys, "k"), (tensors.dv, "v")):
            self._add(target, route.sent, route, self._grads.field(results[0], name))
        if self._has_keys:
            self._add(tensors.dq, route.sent_queries, route, self._dispatcher.queries.field(results[1], "q"))

    def _add(self, target: Tensor, selection: Selection, route: Route, rows: Tensor) -> None:
        """Adds the sums over the ranks that returned a token's gradients, in order of ranks."""
        tokens, splits = selection.tokens(self._dispatcher.plan.n_local), selection.splits
        grads = self._dispatcher.rows_of(target, route)
        total = torch.zeros(grads.shape, device=rows.device)
        for own, part in zip(tokens.split(splits), rows.split(splits), strict=True):
            total[own] += part.float()
        grads.add_(total)
