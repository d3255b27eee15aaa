"""The way home of forward: partial softmaxes of each token, merged where they were made or round by round."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from reformer_dist.distributed.comm import SplitRows
from reformer_dist.ops.lsh.online_softmax import LOWEST, PartialSoftmax
from reformer_dist.parallel.dispatch import Hosted, Outward
from reformer_dist.parallel.packing import Record
from reformer_dist.parallel.plan import Route


class Returns(Protocol):
    def attend(self, route: Route, hosted: Hosted) -> SplitRows:
        """Attends; gives the results that are to go home."""
        ...

    def at_home(self, route: Route, rows: Tensor) -> PartialSoftmax:
        """The whole softmax of this rank's tokens [BH * S], from what has come back."""
        ...


def _no_sums(n_rows: int, width: int, device: torch.device) -> PartialSoftmax:
    zeros = torch.zeros(n_rows, width + 1, dtype=torch.float32, device=device)
    return PartialSoftmax(zeros[:, :width].contiguous(), torch.full_like(zeros[:, 0], LOWEST), zeros[:, width].contiguous())


class MergedReturns:
    """A token comes back once from each rank that attended it: normalised output and logsumexp."""

    def __init__(self, out: Outward) -> None:
        self._out = out
        self._width = out.v.shape[3]
        self._record = Record(o=(out.v.dtype, self._width), lse=(torch.float32, 1))

    def attend(self, route: Route, hosted: Hosted) -> SplitRows:
        rows = hosted.guests.query_rows
        o, lse = (x[rows] for x in self._out.attention(hosted).attend(hosted.q, hosted.k, hosted.v))
        alone = torch.isinf(lse)
        o, lse = o.masked_fill_(alone.unsqueeze(1), 0.0), lse.masked_fill_(alone, LOWEST)
        return SplitRows(self._record.pack(o=o, lse=lse), route.attended.counts, route.asked.counts)

    def at_home(self, route: Route, rows: Tensor) -> PartialSoftmax:
        tokens, counts = route.asked.tokens(self._out.plan.n_local), route.asked.counts
        n_tokens = self._out.part(self._out.v, route).shape[0]
        total = _no_sums(n_tokens, self._width, rows.device)
        o, lse = (self._record.field(rows, name) for name in ("o", "lse"))
        for own, rank_o, rank_lse in zip(tokens.split(counts), o.split(counts), lse.split(counts), strict=True):
            top = rank_lse.squeeze(1)
            found = PartialSoftmax(rank_o.float(), top, (top > LOWEST).float())
            merged = PartialSoftmax(total.o[own], total.row_max[own], total.row_sum[own]).merge(found)
            total.o[own], total.row_max[own], total.row_sum[own] = merged.o, merged.row_max, merged.row_sum
        return total


class RoundReturns:
    """Every round's sums come back as they are and are merged in the order of the rounds, as on one rank.

    Attended by tiles in PyTorch: the other implementations keep no sums of a round by itself.
    """

    def __init__(self, out: Outward) -> None:
        self._out = out
        self._width = out.v.shape[3]
        self._record = Record(o=(torch.float32, self._width), top=(torch.float32, 1), weight=(torch.float32, 1))

    def attend(self, route: Route, hosted: Hosted) -> SplitRows:
        source = hosted.guests.position // self._out.plan.n_local
        packed, sources = [], []
        for layout, sums in self._out.tiled(hosted).attend_rounds(hosted.q, hosted.k, hosted.v):
            rows = (layout.slot_of_row < layout.query_slots.numel() - 1).nonzero().squeeze(1)
            packed.append(self._record.pack(o=sums.o[rows], top=sums.row_max[rows], weight=sums.row_sum[rows]))
            sources.append(source[rows])
        to = torch.cat(sources)
        counts = torch.bincount(to, minlength=self._out.comm.size).tolist()
        return SplitRows(torch.cat(packed)[to.argsort(stable=True)], counts, self._places(route)[1])

    def at_home(self, route: Route, rows: Tensor) -> PartialSoftmax:
        assert route.owners is not None
        n_rounds, n_tokens = route.owners.shape
        places, _ = self._places(route)
        fields = [self._record.field(rows, name) for name in ("o", "top", "weight")]
        total: PartialSoftmax | None = None
        for round_ in range(n_rounds):
            here = (places // n_tokens == round_).nonzero().squeeze(1)
            own = places[here] % n_tokens
            sums = _no_sums(n_tokens, self._width, rows.device)
            o, top, weight = (field[here] for field in fields)
            sums.o[own], sums.row_max[own], sums.row_sum[own] = o, top.squeeze(1), weight.squeeze(1)
            total = sums if total is None else total.merge(sums)
        assert total is not None
        return total

    def _places(self, route: Route) -> tuple[Tensor, list[int]]:
        """round * (BH * S) + token of each row that comes home, in order of ranks, and how many come from each."""
        assert route.owners is not None
        owners = route.owners.flatten()
        real = (owners >= 0).nonzero().squeeze(1)
        order = owners[real].argsort(stable=True)
        return real[order], torch.bincount(owners[real], minlength=self._out.comm.size).tolist()
