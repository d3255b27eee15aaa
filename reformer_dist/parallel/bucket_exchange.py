"""Bucket exchange: LSH attention over a sequence that is sliced over ranks. Tokens are sent to their buckets.

Group of heads by group of heads, each token's vectors are sent, in one message, to every rank that attends from it
or needs it as a key (dispatch). The received tokens are a shard like any other (`ops.lsh.attention`), and their
partial softmax is sent back and merged (combine). While one group is attended, the next one is in flight.

Backward sends the same tokens again, with dO, the logsumexp and rowsum(dO * o), and receives their gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reformer_dist.distributed.comm import CommGroup, SplitRows, Work
from reformer_dist.errors import TrainingError
from reformer_dist.ops.lsh.attention import BackwardTensors, ForwardTensors, Sorter, attend
from reformer_dist.ops.lsh.backends import backend_for
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.torch_tiles.attention import TorchBackend
from reformer_dist.ops.profiling import part
from reformer_dist.parallel.combine import MergedCombiner, RoundCombiner
from reformer_dist.parallel.dispatch import TokenDispatcher, as_one_head
from reformer_dist.parallel.exchange_plan import ExchangePlan, Route, Selection
from reformer_dist.parallel.row_format import RowFormat


class BucketExchange:
    """`ops.lsh.attention.Exchange` among the ranks that made a plan together."""

    def __init__(
        self, plan: ExchangePlan, options: AttentionOptions, comm: CommGroup, *, per_round: bool = False
    ) -> None:
        """per_round: rounds are combined one by one, which in float32 is bitwise the result of one rank.

        Otherwise the partial softmaxes of a token's rounds on one rank are merged there, which saves bytes.
        per_round needs the `torch` backend.
        """
        self.plan, self.comm, self.per_round, self.options = plan, comm, per_round, options

    def forward(self, tensors: ForwardTensors, sorter: Sorter) -> None:
        dispatcher = TokenDispatcher(self.plan, self.options, self.comm, tensors.q, tensors.k, tensors.v)
        combiner = RoundCombiner(dispatcher) if self.per_round else MergedCombiner(dispatcher)
        lses = tensors.lse.unsqueeze(3)

        def attend_route(route: Route, arrived: list[Tensor]) -> list[SplitRows]:
            queries = None if tensors.k is None else dispatcher.query_format.field(arrived[1], "q")
            return [combiner.attend(route, dispatcher.unpack(route, arrived[0], queries), sorter)]

        def merge(route: Route, results: list[Tensor]) -> None:
            o, lse = combiner.merge(route, results[0]).output()
            dispatcher.rows_of(tensors.out, route).copy_(o)
            dispatcher.rows_of(lses, route).copy_(lse.unsqueeze(1))

        self._run(dispatcher.pack, attend_route, merge)

    def backward(self, tensors: BackwardTensors, sorter: Sorter) -> None:
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
        """Dispatches, attends and combines each route; the next one is in flight while this one is attended."""
        self._check_same_plan()
        routes, comm = self.plan.routes, self.comm
        timed = comm.stats.timed
        dispatched: list[Work] = []
        returned: list[Work] = []
        # two more stages: a route dispatched in one is attended in the next and combined in the one after
        for stage in range(len(routes) + 2):
            with timed("dispatch"), part("exchange"):
                arrived = [work.wait() for work in dispatched]
                messages = pack(routes[stage]) if stage < len(routes) else []
                dispatched = [comm.all_to_all_v(message, "dispatch") for message in messages]
            with timed("attend"):
                results = attend(routes[stage - 1], arrived) if arrived else []
            with timed("combine"), part("exchange"):
                combined = [work.wait() for work in returned]
                returned = [comm.all_to_all_v(message, "combine") for message in results]
                if combined:
                    finish(routes[stage - 2], combined)

    def _check_same_plan(self) -> None:
        """Raises TrainingError on all ranks unless their plans match."""
        checksum = torch.tensor([self.plan.checksum], device=self.plan.routes[0].bucket_ids.device)
        difference = int(self.comm.all_reduce(checksum, "plan"))
        if difference:
            raise TrainingError(
                f"bucket exchange: the plans of the ranks do not match (checksums sum to {difference}, not 0); "
                "the ranks of a sequence are not at the same layer of the same step"
            )


def exchanged_attention(q: Tensor, k: Tensor | None, v: Tensor, exchange: BucketExchange) -> Tensor:
    """`bucket_attention` over the whole sequence, given this rank's slice of q, k, v [B, H, S, D]."""
    q, v, k = q.contiguous(), v.contiguous(), None if k is None else k.contiguous()
    backend = TorchBackend if exchange.per_round else backend_for(exchange.options, v, partitioned=True)
    return attend(q, k, v, exchange, backend)


class _Backward:
    """Messages of the backward, and the gradients of this rank's tokens."""

    def __init__(self, dispatcher: TokenDispatcher, tensors: BackwardTensors, sorter: Sorter) -> None:
        self._dispatcher, self._tensors, self._sorter = dispatcher, tensors, sorter
        vector, number = (tensors.d_out.dtype, tensors.d_out.shape[3]), (torch.float32, 1)
        self._has_keys = tensors.k is not None
        separate_q = {"q": vector} if self._has_keys else {}
        self._query_format = RowFormat(d_out=vector, lse=number, delta=number, **separate_q)

    def pack(self, route: Route) -> list[SplitRows]:
        tensors = self._tensors
        assert tensors.delta is not None
        fields = {"d_out": tensors.d_out, "lse": tensors.lse.unsqueeze(3), "delta": tensors.delta.unsqueeze(3)}
        if self._has_keys:
            fields["q"] = tensors.q
        queries = self._dispatcher.pack_queries(route, self._query_format, **fields)
        return [self._dispatcher.pack_keys(route), queries]

    def attend(self, route: Route, arrived: list[Tensor]) -> list[SplitRows]:
        queries = self._query_format.field(arrived[1], "q") if self._has_keys else None
        received = self._dispatcher.unpack(route, arrived[0], queries)
        (q, k, v), rows = (received.q, received.k, received.v), received.query_rows
        d_out = torch.zeros_like(v[0, 0])
        # lse = inf excludes rows that are not queries here, as well as queries that met no key on any rank
        lse = torch.full((len(d_out),), torch.inf, dtype=torch.float32, device=v.device)
        delta = torch.zeros_like(lse)
        for target, name in ((d_out, "d_out"), (lse, "lse"), (delta, "delta")):
            target[rows] = self._query_format.field(arrived[1], name).view(-1, *target.shape[1:])
        dq, dv = torch.zeros_like(q), torch.zeros_like(v)
        dk = None if k is None else torch.zeros_like(k)
        inputs = (q, k, v, as_one_head(d_out), as_one_head(lse), as_one_head(delta))
        self._sorter.sort(received.shard).attend_backward(BackwardTensors(*inputs, dq, dk, dv))
        key_grads = self._dispatcher.key_format.pack(
            k=received.of_keys(dq if dk is None else dk), v=received.of_keys(dv)
        )
        messages = [SplitRows(key_grads, route.received.splits, route.sent.splits)]
        if self._has_keys:
            query_grads = self._dispatcher.query_format.pack(q=dq[0, 0, rows])
            messages.append(SplitRows(query_grads, route.received_queries.splits, route.sent_queries.splits))
        return messages

    def add_gradients(self, route: Route, results: list[Tensor]) -> None:
        tensors, key_format = self._tensors, self._dispatcher.key_format
        self._add(
            tensors.dq if tensors.dk is None else tensors.dk, route.sent, route, key_format.field(results[0], "k")
        )
        self._add(tensors.dv, route.sent, route, key_format.field(results[0], "v"))
        if self._has_keys:
            dq = self._dispatcher.query_format.field(results[1], "q")
            self._add(tensors.dq, route.sent_queries, route, dq)

    def _add(self, target: Tensor, selection: Selection, route: Route, rows: Tensor) -> None:
        """Adds each token's gradients, summed over the ranks that returned them, in order of ranks."""
        tokens, splits = selection.tokens(self._dispatcher.plan.n_local), selection.splits
        grads = self._dispatcher.rows_of(target, route)
        total = torch.zeros(grads.shape, dtype=torch.float32, device=rows.device)
        for index, received in zip(tokens.split(splits), rows.split(splits), strict=True):
            total[index] += received.float()
        grads.add_(total)
