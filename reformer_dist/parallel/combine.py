"""Combine: each token's partial softmaxes return to its rank and are merged there, per rank or per round."""

from __future__ import annotations

import torch
from torch import Tensor

from reformer_dist.distributed.comm import SplitRows
from reformer_dist.ops.lsh.attention import ForwardTensors, Sorter
from reformer_dist.ops.lsh.online_softmax import LOWEST, PartialSoftmax
from reformer_dist.ops.lsh.torch_tiles.attention import TorchSortedShard
from reformer_dist.parallel.dispatch import ReceivedTokens, TokenDispatcher
from reformer_dist.parallel.exchange_plan import Route
from reformer_dist.parallel.row_format import RowFormat


class MergedCombiner:
    """Each rank returns one output and one logsumexp per token, over all rounds that it attended."""

    def __init__(self, dispatcher: TokenDispatcher) -> None:
        self._dispatcher, self._width = dispatcher, dispatcher.v.shape[3]
        self._format = RowFormat(o=(dispatcher.v.dtype, self._width), lse=(torch.float32, 1))

    def attend(self, route: Route, received: ReceivedTokens, sorter: Sorter) -> SplitRows:
        """Attends among the received tokens; returns the message of the results."""
        v, rows = received.v, received.query_rows
        out = torch.empty_like(v)
        lse = torch.empty(v.shape[:3], dtype=torch.float32, device=v.device)
        sorter.sort(received.shard).attend(ForwardTensors(received.q, received.k, v, out, lse))
        o, lse = out[0, 0, rows], lse[0, 0, rows]
        met_no_key = torch.isinf(lse)
        o, lse = o.masked_fill_(met_no_key.unsqueeze(1), 0.0), lse.masked_fill_(met_no_key, LOWEST)
        return SplitRows(self._format.pack(o=o, lse=lse), route.received_queries.splits, route.sent_queries.splits)

    def merge(self, route: Route, rows: Tensor) -> PartialSoftmax:
        """The total softmax of this rank's tokens [BH * S], from the results returned by all ranks."""
        tokens, splits = route.sent_queries.tokens(self._dispatcher.plan.n_local), route.sent_queries.splits
        n_tokens = self._dispatcher.rows_of(self._dispatcher.v, route).shape[0]
        total = PartialSoftmax.empty(n_tokens, self._width, rows.device)
        o, lse = (self._format.field(rows, name) for name in ("o", "lse"))
        for index, rank_o, rank_lse in zip(tokens.split(splits), o.split(splits), lse.split(splits), strict=True):
            row_max = rank_lse.squeeze(1)
            partial = PartialSoftmax(rank_o.float(), row_max, (row_max > LOWEST).float())
            merged = PartialSoftmax(total.o[index], total.row_max[index], total.row_sum[index]).merge(partial)
            total.o[index], total.row_max[index], total.row_sum[index] = merged.o, merged.row_max, merged.row_sum
        return total


class RoundCombiner:
    """Each round's partial softmax is returned, and merged in the order of the rounds: bitwise as on one rank.

    Needs the `torch` backend, since the others do not keep the partial softmax of a single round.
    """

    def __init__(self, dispatcher: TokenDispatcher) -> None:
        self._dispatcher, self._width = dispatcher, dispatcher.v.shape[3]
        number = (torch.float32, 1)
        self._format = RowFormat(o=(torch.float32, self._width), row_max=number, row_sum=number)

    def attend(self, route: Route, received: ReceivedTokens, sorter: Sorter) -> SplitRows:
        assert received.shard.positions is not None
        source = received.shard.positions // self._dispatcher.plan.n_local
        sorted_shard = sorter.sort(received.shard)
        assert isinstance(sorted_shard, TorchSortedShard)
        packed, destinations = [], []
        for layout, partial in sorted_shard.attend_rounds(received.q, received.k, received.v):
            rows = (layout.slot_of_row < layout.query_slots.numel() - 1).nonzero().squeeze(1)
            o, row_max, row_sum = partial.o[rows], partial.row_max[rows], partial.row_sum[rows]
            packed.append(self._format.pack(o=o, row_max=row_max, row_sum=row_sum))
            destinations.append(source[rows])
        destination = torch.cat(destinations)
        splits = torch.bincount(destination, minlength=self._dispatcher.comm.size).tolist()
        return SplitRows(torch.cat(packed)[destination.argsort(stable=True)], splits, self._returned(route)[1])

    def merge(self, route: Route, rows: Tensor) -> PartialSoftmax:
        assert route.owners is not None
        n_rounds, n_tokens = route.owners.shape
        returned, _ = self._returned(route)
        fields = [self._format.field(rows, name) for name in ("o", "row_max", "row_sum")]
        total: PartialSoftmax | None = None
        for round_ in range(n_rounds):
            in_round = (returned // n_tokens == round_).nonzero().squeeze(1)
            index = returned[in_round] % n_tokens
            partial = PartialSoftmax.empty(n_tokens, self._width, rows.device)
            for target, field in zip((partial.o, partial.row_max, partial.row_sum), fields, strict=True):
                target[index] = field[in_round].view(-1, *target.shape[1:])
            total = partial if total is None else total.merge(partial)
        assert total is not None
        return total

    def _returned(self, route: Route) -> tuple[Tensor, list[int]]:
        """round * (BH * S) + token of each returned row, in order of ranks, and the number from each rank."""
        assert route.owners is not None
        owners = route.owners.flatten()
        real = (owners >= 0).nonzero().squeeze(1)
        order = owners[real].argsort(stable=True)
        return real[order], torch.bincount(owners[real], minlength=self._dispatcher.comm.size).tolist()
