"""Combine, the way back of the forward: each token's partial softmaxes, merged per rank or round by round."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from reformer_dist.distributed.comm import SplitRows
from reformer_dist.ops.lsh.attention import Forward, Sorter
from reformer_dist.ops.lsh.online_softmax import LOWEST, PartialSoftmax
from reformer_dist.ops.lsh.torch_tiles.attention import TorchSortedShard
from reformer_dist.parallel.dispatch import Received, TokenDispatcher
from reformer_dist.parallel.exchange_plan import Route
from reformer_dist.parallel.row_format import RowFormat


class Combiner(Protocol):
    def attend(self, route: Route, received: Received, sorter: Sorter) -> SplitRows:
        """Attends among the received tokens; returns the results to send back."""
        ...

    def merge(self, route: Route, rows: Tensor) -> PartialSoftmax:
        """The whole softmax of this rank's tokens [BH * S], from the results sent back."""
        ...


def _no_sums(n_rows: int, width: int, device: torch.device) -> PartialSoftmax:
    zeros = torch.zeros(n_rows, width + 1, dtype=torch.float32, device=device)
    return PartialSoftmax(
        zeros[:, :width].contiguous(), torch.full_like(zeros[:, 0], LOWEST), zeros[:, width].contiguous()
    )


class MergedCombiner:
    """Each rank that attended a token returns one output and one logsumexp, over all rounds that it attended."""

    def __init__(self, dispatcher: TokenDispatcher) -> None:
        self._dispatcher = dispatcher
        self._width = dispatcher.v.shape[3]
        self._record = RowFormat(o=(dispatcher.v.dtype, self._width), lse=(torch.float32, 1))

    def attend(self, route: Route, received: Received, sorter: Sorter) -> SplitRows:
        v, rows = received.v, received.tokens.query_rows
        out = torch.empty_like(v)
        lse = torch.empty(v.shape[:3], dtype=torch.float32, device=v.device)
        sorter.sort(received.shard).attend(Forward(received.q, received.k, v, out, lse))
        o, lse = out[0, 0, rows], lse[0, 0, rows]
        has_no_key = torch.isinf(lse)
        o, lse = o.masked_fill_(has_no_key.unsqueeze(1), 0.0), lse.masked_fill_(has_no_key, LOWEST)
        return SplitRows(self._record.pack(o=o, lse=lse), route.received_queries.splits, route.sent_queries.splits)

    def merge(self, route: Route, rows: Tensor) -> PartialSoftmax:
        tokens, splits = route.sent_queries.tokens(self._dispatcher.plan.n_local), route.sent_queries.splits
        n_tokens = self._dispatcher.rows_of(self._dispatcher.v, route).shape[0]
        total = _no_sums(n_tokens, self._width, rows.device)
        o, lse = (self._record.field(rows, name) for name in ("o", "lse"))
        for own, rank_o, rank_lse in zip(tokens.split(splits), o.split(splits), lse.split(splits), strict=True):
            top = rank_lse.squeeze(1)
            sums = PartialSoftmax(rank_o.float(), top, (top > LOWEST).float())
            merged = PartialSoftmax(total.o[own], total.row_max[own], total.row_sum[own]).merge(sums)
            total.o[own], total.row_max[own], total.row_sum[own] = merged.o, merged.row_max, merged.row_sum
        return total


class RoundCombiner:
    """Every round's sums are returned and merged in the order of the rounds: bitwise the result of one rank.

    By the `torch` backend: the others keep no sums of single rounds.
    """

    def __init__(self, dispatcher: TokenDispatcher) -> None:
        self._dispatcher = dispatcher
        self._width = dispatcher.v.shape[3]
        self._record = RowFormat(o=(torch.float32, self._width), top=(torch.float32, 1), weight=(torch.float32, 1))

    def attend(self, route: Route, received: Received, sorter: Sorter) -> SplitRows:
        source = received.tokens.positions // self._dispatcher.plan.n_local
        order = sorter.sort(received.shard)
        assert isinstance(order, TorchSortedShard)
        packed, sources = [], []
        for layout, sums in order.attend_rounds(received.q, received.k, received.v):
            rows = (layout.slot_of_row < layout.query_slots.numel() - 1).nonzero().squeeze(1)
            packed.append(self._record.pack(o=sums.o[rows], top=sums.row_max[rows], weight=sums.row_sum[rows]))
            sources.append(source[rows])
        to = torch.cat(sources)
        splits = torch.bincount(to, minlength=self._dispatcher.comm.size).tolist()
        return SplitRows(torch.cat(packed)[to.argsort(stable=True)], splits, self._returned(route)[1])

    def merge(self, route: Route, rows: Tensor) -> PartialSoftmax:
        assert route.owners is not None
        n_rounds, n_tokens = route.owners.shape
        returned, _ = self._returned(route)
        fields = [self._record.field(rows, name) for name in ("o", "top", "weight")]
        total: PartialSoftmax | None = None
        for round_ in range(n_rounds):
            in_round = (returned // n_tokens == round_).nonzero().squeeze(1)
            own = returned[in_round] % n_tokens
            sums = _no_sums(n_tokens, self._width, rows.device)
            o, top, weight = (field[in_round] for field in fields)
            sums.o[own], sums.row_max[own], sums.row_sum[own] = o, top.squeeze(1), weight.squeeze(1)
            total = sums if total is None else total.merge(sums)
        assert total is not None
        return total

    def _returned(self, route: Route) -> tuple[Tensor, list[int]]:
        """round * (BH * S) + token of each returned row, in order of ranks, and how many each rank returns."""
        assert route.owners is not None
        owners = route.owners.flatten()
        real = (owners >= 0).nonzero().squeeze(1)
        order = owners[real].argsort(stable=True)
        return real[order], torch.bincount(owners[real], minlength=self._dispatcher.comm.size).tolist()
