"""Who sends which token where: made once for a layer's forward, and kept for its recompute and its backward.

Every rank counts its tokens by bucket. An exclusive scan over the ranks tells how many members of each bucket
stand before a rank's own, so each rank knows the place of its tokens in the order of the whole sequence
without holding it, hence the rank that attends them and the ranks that need them as keys (`ops.lsh.runs`). A
token goes once to each of those, whatever the rounds that meet there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.distributed.comm import CommGroup, SplitRows
from reformer_dist.errors import TrainingError
from reformer_dist.ops.lsh.held import HeldRows, Rows
from reformer_dist.ops.lsh.options import AttentionOptions, ChunkRule
from reformer_dist.ops.lsh.partition import (
    Partition,
    Recipients,
    chunk_recipients,
    chunk_partition,
    choose_tiling,
    window_recipients,
    window_partition,
)
from reformer_dist.ops.lsh.sorting import bucket_ranks, count_buckets, position_codes, row_sort_keys
from reformer_dist.parallel.packing import Record, pack_bits, unpack_bits

PHASE = "count"
# Tokens of this rank that travel in one message: small enough for the next message to overlap with their
# attention, and for what arrives of them to fit beside the model.
GROUP_TOKENS = {"cpu": 2**14, "cuda": 2**18}


@dataclass(frozen=True)
class Selection:
    """Some tokens for each rank, or of each rank."""

    bits: Tensor
    """[P, BH, S / 8]"""
    counts: list[int]
    """How many for each rank."""

    @staticmethod
    def of(bits: Tensor) -> Selection:
        ones = unpack_bits(bits, bits.shape[2] * 8)
        return Selection(bits, ones.sum(dim=(1, 2)).tolist())

    def mask(self, n_local: int) -> Tensor:
        """bool [P, BH, S]."""
        return unpack_bits(self.bits, n_local)

    def tokens(self, n_local: int) -> Tensor:
        """Their numbers in [BH * S], rank by rank."""
        return self.mask(n_local).flatten(1).nonzero()[:, 1]


@dataclass(frozen=True)
class Route:
    """The tokens of some units on their way from this rank and to it."""

    units: slice
    sent: Selection
    """This rank's tokens that each rank needs."""
    asked: Selection
    """Those that it attends as queries, in any round."""
    received: Selection
    """Each rank's tokens that are needed here."""
    attended: Selection
    """Likewise, as queries."""
    ids: Tensor
    """[rows, R] bucket of each received token, n_buckets in rounds in which it is not needed here."""
    codes: Tensor | None
    """[R, rows] codes of its places, with count_pairs_once."""
    owners: Tensor | None
    """int32 [R, BH * S] rank that attends each of this rank's tokens, -1 for padding; if rounds return apart."""
    total: Tensor
    """int32 [BH, R, K] members of each bucket on all ranks."""
    balance: int
    """A checksum of what this rank sends less that of what it gets: over all ranks it sums to 0."""


@dataclass(frozen=True)
class Plan:
    """The exchange of one attention call."""

    routes: list[Route]
    seq_len: int
    """Of the whole sequence, as attention sees it."""
    n_local: int
    """Tokens of a sequence on each rank."""
    balance: int
    """The sum of its routes' balances."""


def make_plan(
    buckets: Tensor, options: AttentionOptions, seq_len: int, comm: CommGroup, *, merge_returns: bool = True
) -> Plan:
    """The plan for bucket ids [BH, R, S] of this rank's tokens, where n_buckets marks padding.

    Raises TrainingError, alike on every rank, where what arrives is not what the counts foretell.
    """
    with comm.stats.timed(PHASE):
        return _make_plan(buckets, options, seq_len, comm, keeps_owners=not merge_returns)


def _make_plan(
    buckets: Tensor, options: AttentionOptions, seq_len: int, comm: CommGroup, *, keeps_owners: bool
) -> Plan:
    n_units, _, n_local = buckets.shape
    before, total = _scan(count_buckets(buckets, options.n_buckets), comm)
    size = max(1, GROUP_TOKENS["cuda" if buckets.is_cuda else "cpu"] // n_local)
    routes, strays = [], 0
    for first in range(0, n_units, size):
        units = slice(first, min(first + size, n_units))
        home = _HomePlaces(buckets[units], before[units], total[units], options, seq_len, comm.size)
        routes.append(_route(units, home, options, comm, keeps_owners=keeps_owners))
        strays += _count_strays(routes[-1], options, seq_len, n_local, comm)
    balance = _wrapped(sum(route.balance for route in routes))
    found = torch.tensor([strays, balance], device=buckets.device)
    strays, difference = comm.all_reduce(found, PHASE).tolist()
    if strays or difference:
        raise TrainingError(
            f"bucket exchange: {strays} tokens arrived where the counts foretell others (checksums differ by "
            f"{difference}); the ranks of a sequence do not agree about its tokens"
        )
    return Plan(routes, seq_len, n_local, balance)


def _scan(counts: Tensor, comm: CommGroup) -> tuple[Tensor, Tensor]:
    """From [BH, R, K] of this rank: the sums over the ranks before it, and over all ranks.

    Each rank sums a share of the columns, so that none holds the counts of all ranks.
    """
    n_units, n_rounds, n_buckets = counts.shape
    padded = torch.nn.functional.pad(counts, (0, -n_buckets % comm.size))
    columns = comm.all_to_all(padded.unflatten(2, (comm.size, -1)).permute(2, 0, 1, 3), PHASE)
    until = columns.cumsum(dim=0, dtype=torch.int32)
    answer = torch.stack([until - columns, until[-1:].expand_as(until)], dim=1)
    shares = comm.all_to_all(answer, PHASE)  # [P, 2, BH, R, K / P]
    before, total = shares.permute(1, 2, 3, 0, 4).reshape(2, n_units, n_rounds, -1)[..., :n_buckets].unbind()
    return before.contiguous(), total.contiguous()


class _HomePlaces:
    """Where this rank's tokens of some units stand, and who takes them."""

    def __init__(
        self, buckets: Tensor, before: Tensor, total: Tensor, options: AttentionOptions, seq_len: int, size: int
    ) -> None:
        self.buckets, self.total, self._size = buckets, total, size
        n_units, n_rounds, n_local = buckets.shape
        self.needs = torch.zeros(size, n_units, n_local, dtype=torch.bool, device=buckets.device)
        self.asks = torch.zeros_like(self.needs)
        self._readers: list[list[Recipients]] = []
        codes, owners = [], []
        rule = options.rule
        tile_len = choose_tiling(rule, seq_len, options.n_buckets).tile_len
        for r in range(n_rounds):
            bucket = buckets[:, r]
            rank = bucket_ranks(bucket, before[:, r])
            if isinstance(rule, ChunkRule):
                owner, readers = chunk_recipients(bucket, rank, total[:, r], rule, seq_len, size)
            else:
                owner, readers = window_recipients(bucket, rank, total[:, r], rule, tile_len, size)
            self._mark(self.asks, owner, owner >= 0)
            for some in readers:
                for taker, takes in some.iter_ranks(size):
                    self._mark(self.needs, taker, takes)
            self._readers.append(readers)
            owners.append(owner.flatten().to(torch.int32))
            if options.count_pairs_once:
                codes.append(position_codes(bucket, rank, total[:, r], rule))
        self.codes = torch.stack(codes, dim=1) if codes else None
        """[BH, R, S]"""
        self.owners = torch.stack(owners)
        """[R, BH * S]"""

    def _mark(self, mask: Tensor, rank: Tensor, takes: Tensor) -> None:
        unit, token = takes.nonzero(as_tuple=True)
        mask[rank[unit, token], unit, token] = True

    def sent_ids(self, taker: Tensor, unit: Tensor, token: Tensor, n_buckets: int) -> Tensor:
        """[rows, R] bucket of each sent token, n_buckets in rounds in which the taker does not need it."""
        columns = []
        for r, readers in enumerate(self._readers):
            takes = torch.zeros_like(taker, dtype=torch.bool)
            for some in readers:
                takes |= (some.first[unit, token] <= taker) & (taker <= some.last[unit, token])
            # between the first and the last taker there may be ranks that own nothing
            n_tiles = readers[0].n_tiles[unit, 0]
            takes &= (taker + 1) * n_tiles // self._size > taker * n_tiles // self._size
            columns.append(self.buckets[unit, r, token].masked_fill(~takes, n_buckets))
        return torch.stack(columns, dim=1)


def _route(units: slice, home: _HomePlaces, options: AttentionOptions, comm: CommGroup, *, keeps_owners: bool) -> Route:
    """Tells every rank what it will get of these units, and hears the same."""
    bits = torch.stack([pack_bits(home.needs), pack_bits(home.asks)], dim=1)
    taker, unit, token = home.needs.nonzero(as_tuple=True)
    ids = home.sent_ids(taker, unit, token, options.n_buckets)
    fields = {"ids": (ids.dtype, ids.shape[1])}
    values = {"ids": ids}
    if home.codes is not None:
        fields["codes"] = (torch.int32, ids.shape[1])
        values["codes"] = home.codes[unit, :, token]
    record = Record(**fields)
    rows = record.pack(**values)
    heard = comm.all_to_all(bits, PHASE)
    sent, asked, received, attended = (
        Selection.of(both[:, which].contiguous()) for both in (bits, heard) for which in (0, 1)
    )
    arrived = comm.all_to_all_v(SplitRows(rows, sent.counts, received.counts), PHASE).wait()
    codes = record.field(arrived, "codes").t().contiguous() if home.codes is not None else None
    came = record.field(arrived, "ids").contiguous()
    owners = home.owners if keeps_owners else None
    sum_sent = _checksum(sent, asked, ids, comm, is_sent=True)
    balance = _wrapped(sum_sent - _checksum(received, attended, came, comm, is_sent=False))
    return Route(units, sent, asked, received, attended, came, codes, owners, home.total, balance)


@dataclass(frozen=True)
class Guests:
    """The tokens that this rank holds of some units while it attends them, its own among them."""

    unit: Tensor
    """[rows] from 0 in the route."""
    position: Tensor
    """[rows] in the whole sequence."""
    query_rows: Tensor
    """Those that are queries here in any round, in order of ranks."""


def guests_of(route: Route, plan: Plan) -> Guests:
    """Who the received rows are."""
    source, unit, token = route.received.mask(plan.n_local).nonzero(as_tuple=True)
    is_query = route.attended.mask(plan.n_local)[source, unit, token]
    return Guests(unit, source * plan.n_local + token, is_query.nonzero().squeeze(1))


def held_rows(route: Route, guests: Guests, plan: Plan, numbers: Tensor, comm: CommGroup) -> HeldRows:
    """The received rows. numbers [all units]: the unit numbers of this rank's call."""
    codes = route.codes if route.ids.shape[1] > 1 else None
    rows = Rows(numbers[route.units][guests.unit], guests.position, codes)
    keys = list(_keys_by_round(route, guests.unit))
    return HeldRows(rows, keys, route.total, plan.seq_len, Partition(comm.index, comm.size))


def _keys_by_round(route: Route, unit: Tensor) -> Iterator[Tensor]:
    n_units, _, n_buckets = route.total.shape
    for r in range(route.ids.shape[1]):
        yield row_sort_keys(unit, route.ids[:, r], n_units, n_buckets)


def _count_strays(route: Route, options: AttentionOptions, seq_len: int, n_local: int, comm: CommGroup) -> int:
    """How many tokens have come, or stayed away, against what the counts of all ranks foretell."""
    part, rule = Partition(comm.index, comm.size), options.rule
    _, unit, _ = route.received.mask(n_local).nonzero(as_tuple=True)
    strays = 0
    for r, keys in enumerate(_keys_by_round(route, unit)):
        total = route.total[:, r].long()
        found = torch.bincount(keys, minlength=total.numel() + 1)[:-1].view_as(total)
        if isinstance(rule, ChunkRule):
            found = found.sum(dim=1)
            run = chunk_partition(seq_len, rule, part)
            first = torch.tensor(run.needed, dtype=torch.int64, device=keys.device) * rule.chunk_len
            foretold = (total.sum(dim=1, keepdim=True) - first).clamp(0, rule.chunk_len).sum(dim=1)
        else:
            run_of = window_partition(total, rule, choose_tiling(rule, seq_len, options.n_buckets).tile_len, part)
            foretold = run_of.stop - run_of.start
        strays += int((found - foretold).abs().sum())
    return strays


def _checksum(needed: Selection, queries: Selection, ids: Tensor, comm: CommGroup, *, is_sent: bool) -> int:
    """A number of the tokens that this rank sends to each rank, or gets from each, and of their bucket ids."""
    other = torch.arange(comm.size, device=ids.device)
    pair = comm.index * comm.size + other if is_sent else other * comm.size + comm.index
    of_ids = torch.stack([_weighed(part.flatten()) for part in ids.split(needed.counts)])
    of_bits = [_weighed(selection.bits.flatten(1)) for selection in (needed, queries)]
    return int(((of_ids + 3 * of_bits[0] + 5 * of_bits[1]) * (pair + 1)).sum())


def _wrapped(number: int) -> int:
    """Into 64 bits, in which sums over the ranks wrap around too: what should sum to 0 still does."""
    return (number + 2**63) % 2**64 - 2**63


def _weighed(numbers: Tensor) -> Tensor:
    """Sum over the last dimension in which every place counts differently (up to 8191 of them)."""
    place = torch.arange(1, numbers.shape[-1] + 1, device=numbers.device) % 8191
    return (numbers.long() * place).sum(dim=-1)
