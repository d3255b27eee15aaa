"""LSH attention over a sequence whose tokens lie on several ranks: tokens travel to the ranks of their buckets.

Group by group of (batch, head) units: what a token needs to be attended travels to each rank that attends or
sees it, in one message; there the tokens are rows like any others (`ops.lsh.held`); and their partial
softmax travels back and is merged at home. While one group is attended, the next one travels.

Backward sends the same tokens again with dO, the total logsumexp and rowsum(dO * o), and brings gradients home.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reformer_dist.distributed.comm import CommGroup, SplitRows, Work
from reformer_dist.errors import TrainingError
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.parallel.combine import MergedReturns, Returns, RoundReturns
from reformer_dist.parallel.dispatch import Outward
from reformer_dist.parallel.packing import Record
from reformer_dist.parallel.plan import Plan, Route, Selection


def exchanged_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    plan: Plan,
    options: AttentionOptions,
    comm: CommGroup,
    *,
    merge_returns: bool = True,
) -> Tensor:
    """What `bucket_attention` gives for the whole sequence, of which this rank holds q, k, v [B, H, S, D].

    The plan was made of the bucket ids by the same ranks. merge_returns: partial results of a token whose
    rounds are attended on the same rank are merged there, which saves bytes; without it, rounds are merged at
    home in their order, by tiles in PyTorch, and in float32 the result is that of one rank to the last bit.
    """
    if not merge_returns:
        options = replace(options, backend="torch")
    out: Tensor = _ExchangedAttention.apply(q, k, v, plan, options, comm, merge_returns)
    return out


class _ExchangedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
        plan: Plan,
        options: AttentionOptions,
        comm: CommGroup,
        merge_returns: bool,
    ) -> Tensor:
        q, v = q.contiguous(), v.contiguous()
        k = None if k is None else k.contiguous()
        outward = Outward(plan, options, comm, q, k, v)
        back: Returns = (MergedReturns if merge_returns else RoundReturns)(outward)
        out = torch.empty_like(v)
        lse = torch.empty((*v.shape[:3], 1), dtype=torch.float32, device=v.device)

        def attend(route: Route, arrived: list[Tensor]) -> list[SplitRows]:
            query_rows = outward.queries.field(arrived[1], "q") if k is not None else None
            return [back.attend(route, outward.host(route, arrived[0], query_rows))]

        def at_home(route: Route, results: list[Tensor]) -> None:
            o, route_lse = back.at_home(route, results[0]).output(outward.part(v, route))
            outward.part(out, route).copy_(o)
            outward.part(lse, route).copy_(route_lse.unsqueeze(1))

        _run(plan, comm, outward.pack, attend, at_home)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.options, ctx.comm = plan, options, comm
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        outward = Outward(ctx.plan, ctx.options, ctx.comm, q, k, v)
        call = _Backward(outward, out, lse, grads[0].contiguous())
        _run(ctx.plan, ctx.comm, call.pack, call.attend, call.at_home)
        return call.dq, call.dk, call.dv, None, None, None, None


def _run(
    plan: Plan,
    comm: CommGroup,
    pack: Callable[[Route], list[SplitRows]],
    attend: Callable[[Route, list[Tensor]], list[SplitRows]],
    bring_home: Callable[[Route, list[Tensor]], None],
) -> None:
    """Each route goes out, is attended and comes home; the next one travels while this one is attended."""
    _check_same_plan(plan, comm)
    routes, timed = plan.routes, comm.stats.timed
    going_out: list[Work] = []
    going_home: list[Work] = []
    with torch.autocast(plan.routes[0].ids.device.type, enabled=False):
        # one more turn at each end: what goes out at a turn is attended at the next, and comes home after that
        for turn in range(len(routes) + 2):
            with timed("exchange"):
                arrived = [delivery.wait() for delivery in going_out]
                out = pack(routes[turn]) if turn < len(routes) else []
                going_out = [comm.all_to_all_v(parcel, "exchange") for parcel in out]
            with timed("attend"):
                results = attend(routes[turn - 1], arrived) if arrived else []
            with timed("return"):
                at_home = [delivery.wait() for delivery in going_home]
                going_home = [comm.all_to_all_v(parcel, "return") for parcel in results]
                if at_home:
                    bring_home(routes[turn - 2], at_home)


def _check_same_plan(plan: Plan, comm: CommGroup) -> None:
    """All ranks are about to exchange by plans that fit one another, or all of them raise TrainingError."""
    difference = int(comm.all_reduce(torch.tensor([plan.balance], device=plan.routes[0].ids.device), "count"))
    if difference:
        raise TrainingError(
            f"bucket exchange: the plans of the ranks do not fit one another (checksums differ by {difference}); "
            "the ranks of a sequence are not at the same layer of the same step"
        )


class _Backward:
    """The gradients at home, and what travels for them."""

    def __init__(self, outward: Outward, out: Tensor, lse: Tensor, d_out: Tensor) -> None:
        self._outward, self._lse, self._d_out = outward, lse, d_out
        self._delta = (d_out.float() * out.float()).sum(dim=3, keepdim=True)
        width, number = (d_out.dtype, d_out.shape[3]), (torch.float32, 1)
        self._has_keys = outward.k is not None
        own_queries = {"q": width} if self._has_keys else {}
        self._asked = Record(d_out=width, lse=number, delta=number, **own_queries)
        self._grads = outward.keys
        self.dq, self.dv = torch.empty_like(outward.q), torch.empty_like(outward.v)
        self.dk = None if outward.k is None else torch.empty_like(outward.k)

    def pack(self, route: Route) -> list[SplitRows]:
        values = {"d_out": self._d_out, "lse": self._lse, "delta": self._delta}
        if self._has_keys:
            values["q"] = self._outward.q
        return [self._outward.pack_keys(route), self._outward.pack_asked(route, self._asked, **values)]

    def attend(self, route: Route, arrived: list[Tensor]) -> list[SplitRows]:
        asked = {name: self._asked.field(arrived[1], name) for name in ("d_out", "lse", "delta")}
        query_rows = self._asked.field(arrived[1], "q") if self._has_keys else None
        here = self._outward.host(route, arrived[0], query_rows)
        rows = here.guests.query_rows
        d_out = torch.zeros_like(here.v)
        # lse = inf and dO = 0: rows that are no queries here, or that met nobody anywhere, give nothing to anybody
        lse = torch.full((d_out.shape[0],), torch.inf, device=d_out.device)
        delta = torch.zeros_like(lse)
        lse[rows], delta[rows] = asked["lse"].squeeze(1), asked["delta"].squeeze(1)
        d_out[rows] = asked["d_out"].masked_fill(torch.isinf(asked["lse"]), 0.0)
        attention = self._outward.attention(here)
        dq, dk, dv = attention.attend_backward(here.q, here.k, here.v, d_out, lse=lse, delta=delta)
        of_keys = self._grads.pack(k=dq if dk is None else dk, v=dv)
        grads = SplitRows(of_keys, route.received.counts, route.sent.counts)
        if not self._has_keys:
            return [grads]
        of_queries = self._outward.queries.pack(q=dq[rows])
        return [grads, SplitRows(of_queries, route.attended.counts, route.asked.counts)]

    def at_home(self, route: Route, results: list[Tensor]) -> None:
        part = self._outward.part
        d_keys, dv = (self._summed(route.sent, route, self._grads.field(results[0], name)) for name in ("k", "v"))
        alone = torch.isinf(part(self._lse, route)).float()
        # who met nobody has o = v
        part(self.dv, route).copy_(dv.addcmul_(part(self._d_out, route).float(), alone))
        if self.dk is None:
            part(self.dq, route).copy_(d_keys)
        else:
            part(self.dk, route).copy_(d_keys)
            dq = self._summed(route.asked, route, self._outward.queries.field(results[1], "q"))
            part(self.dq, route).copy_(dq)

    def _summed(self, selection: Selection, route: Route, rows: Tensor) -> Tensor:
        """Sums [BH * S, D] over the ranks from which a token's gradients have come, in order of ranks."""
        tokens, counts = selection.tokens(self._outward.plan.n_local), selection.counts
        total = torch.zeros(self._outward.part(self._d_out, route).shape, device=rows.device)
        for own, part in zip(tokens.split(counts), rows.split(counts), strict=True):
            total[own] += part.float()
        return total
