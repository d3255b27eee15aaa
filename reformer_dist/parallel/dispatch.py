"""The way out: what a token needs to be attended, packed at home and unpacked where it is attended."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.distributed.comm import CommGroup, SplitRows
from reformer_dist.ops.lsh.backends import attention_of_held
from reformer_dist.ops.lsh.held import HeldAttention, HeldRows
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.torch_tiles.held import TiledRows
from reformer_dist.ops.workspace import Workspace
from reformer_dist.parallel.packing import Record
from reformer_dist.parallel.plan import Guests, Plan, Route, guests_of, held_rows


@dataclass(frozen=True)
class Hosted:
    """Guests with what has come of them: q, k, v [rows, D]."""

    guests: Guests
    held: HeldRows
    q: Tensor
    k: Tensor | None
    """None for shared query-key attention."""
    v: Tensor


class Outward:
    """The tensors of one call at home, [B, H, S, D], and how they reach the ranks that need them."""

    def __init__(
        self, plan: Plan, options: AttentionOptions, comm: CommGroup, q: Tensor, k: Tensor | None, v: Tensor
    ) -> None:
        """k is None for shared query-key attention: q travels, and keys are made where it arrives."""
        self.plan, self.options, self.comm = plan, options, comm
        self.q, self.k, self.v = q, k, v
        width = (v.dtype, v.shape[3])
        self.keys = Record(k=width, v=width)
        self.queries = Record(q=width)
        self._scratch = Workspace(v.device)
        self._numbers = options.head_indices(v.shape[0], v.shape[1], v.device)

    @staticmethod
    def part(x: Tensor, route: Route) -> Tensor:
        """A route's rows of x [B, H, S, width]: [BH * S, width]."""
        return x.flatten(0, 1)[route.units].view(-1, x.shape[3])

    def pack(self, route: Route) -> list[SplitRows]:
        """Keys and values to every rank that needs them; queries of their own to those that attend them."""
        parcels = [self.pack_keys(route)]
        if self.k is not None:
            parcels.append(self.pack_asked(route, self.queries, q=self.q))
        return parcels

    def pack_keys(self, route: Route) -> SplitRows:
        tokens = route.sent.tokens(self.plan.n_local)
        keys = self.q if self.k is None else self.k
        rows = self.keys.pack(k=self.part(keys, route)[tokens], v=self.part(self.v, route)[tokens])
        return SplitRows(rows, route.sent.counts, route.received.counts)

    def pack_asked(self, route: Route, record: Record, **values: Tensor) -> SplitRows:
        """Fields [B, H, S, width] of the tokens for the ranks that attend them as queries."""
        tokens = route.asked.tokens(self.plan.n_local)
        rows = record.pack(**{name: self.part(value, route)[tokens] for name, value in values.items()})
        return SplitRows(rows, route.asked.counts, route.attended.counts)

    def host(self, route: Route, key_rows: Tensor, query_rows: Tensor | None) -> Hosted:
        """Unpacks what has come; query_rows [asked rows, D] if queries travel apart from keys."""
        guests = guests_of(route, self.plan)
        k, v = (self.keys.field(key_rows, name) for name in ("k", "v"))
        held = held_rows(route, guests, self.plan, self._numbers, self.comm)
        if query_rows is None:
            return Hosted(guests, held, k, None, v)
        q = torch.zeros_like(k)
        q[guests.query_rows] = query_rows
        return Hosted(guests, held, q, k, v)

    def attention(self, hosted: Hosted) -> HeldAttention:
        """By the backend that the options name or the device chooses."""
        return attention_of_held(hosted.held, self.options, hosted.v.shape[1], hosted.v.dtype, self._scratch)

    def tiled(self, hosted: Hosted) -> TiledRows:
        """In plain PyTorch, which knows the sums of each round."""
        return TiledRows.of(hosted.held, self.options, self._scratch)
