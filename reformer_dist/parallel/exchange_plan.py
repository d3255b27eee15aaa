"""The plan of a bucket exchange: which tokens go to which rank. Made in a forward, kept for its recompute.

Every rank counts its tokens by bucket. An exclusive scan over the ranks counts the members of each bucket that
precede a rank's own, so each rank knows the slots of its tokens in the sorted order of the whole sequence without
holding it, hence the rank that attends them and the ranks that need them as keys (`ops.lsh.partition`). A token is
sent once to each of those, whatever the number of rounds that are attended there.

Sizes: BH heads (batch row x head) of a route, S local tokens of each, R rounds, K buckets, P ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.distributed.comm import CommGroup, SplitRows
from reformer_dist.errors import TrainingError
from reformer_dist.ops.lsh.attention import Shard
from reformer_dist.ops.lsh.options import AttentionOptions, ChunkRule
from reformer_dist.ops.lsh.partition import (
    Partition,
    Recipients,
    choose_tiling,
    chunk_partition,
    chunk_recipients,
    window_partition,
    window_recipients,
)
from reformer_dist.ops.lsh.sorting import bucket_ranks, count_buckets, position_codes, row_sort_keys
from reformer_dist.parallel.row_format import RowFormat, pack_bits, unpack_bits

PHASE = "count"
# Local tokens that travel in one message: few enough for the next message to overlap with their attention, and for
# what is received of them to fit beside the model.
GROUP_TOKENS = {"cpu": 2**14, "cuda": 2**18}


@dataclass(frozen=True)
class Selection:
    """Some local tokens for each rank, or tokens from each rank."""

    bits: Tensor
    """uint8 [P, BH, S / 8]"""
    splits: list[int]
    """How many for, or from, each rank."""

    @staticmethod
    def of(bits: Tensor) -> Selection:
        ones = unpack_bits(bits, bits.shape[2] * 8)
        return Selection(bits, ones.sum(dim=(1, 2)).tolist())

    def mask(self, n_local: int) -> Tensor:
        """bool [P, BH, S]."""
        return unpack_bits(self.bits, n_local)

    def tokens(self, n_local: int) -> Tensor:
        """Their indices in [BH * S], rank by rank."""
        return self.mask(n_local).flatten(1).nonzero()[:, 1]


@dataclass(frozen=True)
class Route:
    """The tokens of a group of heads that this rank sends and receives."""

    heads: slice
    """Of the B * H heads."""
    sent: Selection
    """Local tokens that each rank needs."""
    sent_queries: Selection
    """Those of them that it attends as queries, in any round."""
    received: Selection
    """Tokens of each rank that this rank needs."""
    received_queries: Selection
    """Those of them that it attends as queries, in any round."""
    bucket_ids: Tensor
    """[L, R] of the L received tokens; n_buckets in rounds in which they are not needed here."""
    position_codes: Tensor | None
    """[R, L] likewise, with count_pairs_once: see `sorting.position_codes`."""
    owners: Tensor | None
    """int32 [R, BH * S] rank that attends each local token, -1 for padding; only if combined round by round."""
    bucket_sizes: Tensor
    """int32 [BH, R, K] members of each bucket on all ranks."""
    checksum: int
    """That of what this rank sends less that of what it receives: over all ranks they sum to 0."""


@dataclass(frozen=True)
class ExchangePlan:
    """The exchange of one attention call."""

    routes: list[Route]
    seq_len: int
    """Of the whole sequence, as attention sees it."""
    n_local: int
    """Tokens of a sequence on each rank."""
    checksum: int
    """The sum of its routes' checksums."""


def make_plan(
    buckets: Tensor, options: AttentionOptions, seq_len: int, comm: CommGroup, *, per_round: bool = False
) -> ExchangePlan:
    """The plan for bucket ids [BH, R, S] of the local tokens of all heads, where n_buckets marks padding.

    per_round: rounds will be combined one by one. Raises TrainingError, alike on every rank, where the tokens that
    were received are not those that the counts predict.
    """
    with comm.stats.timed(PHASE):
        return _make_plan(buckets, options, seq_len, comm, keeps_owners=per_round)


def _make_plan(
    buckets: Tensor, options: AttentionOptions, seq_len: int, comm: CommGroup, *, keeps_owners: bool
) -> ExchangePlan:
    n_heads, _, n_local = buckets.shape
    preceding, sizes = _scan(count_buckets(buckets, options.n_buckets), comm)
    group_size = max(1, GROUP_TOKENS["cuda" if buckets.is_cuda else "cpu"] // n_local)
    routes, mismatches = [], 0
    for first in range(0, n_heads, group_size):
        heads = slice(first, min(first + group_size, n_heads))
        local = _LocalTokens(buckets[heads], preceding[heads], sizes[heads], options, seq_len, comm.size)
        routes.append(_make_route(heads, local, options, comm, keeps_owners=keeps_owners))
        mismatches += _count_mismatches(routes[-1], options, seq_len, n_local, comm)
    checksum = _wrapped(sum(route.checksum for route in routes))
    sums = torch.tensor([mismatches, checksum], device=buckets.device)
    mismatches, difference = comm.all_reduce(sums, PHASE).tolist()
    if mismatches or difference:
        raise TrainingError(
            f"bucket exchange: {mismatches} received tokens differ from what the bucket counts predict (checksums "
            f"sum to {difference}, not 0); the ranks of a sequence disagree about its tokens"
        )
    return ExchangePlan(routes, seq_len, n_local, checksum)


def _scan(counts: Tensor, comm: CommGroup) -> tuple[Tensor, Tensor]:
    """From [BH, R, K] of this rank: the sums over the ranks before it, and over all ranks.

    Each rank sums K / P of the columns, so that none holds the counts of all ranks.
    """
    n_heads, n_rounds, n_buckets = counts.shape
    padded = torch.nn.functional.pad(counts, (0, -n_buckets % comm.size))
    columns = comm.all_to_all(padded.unflatten(2, (comm.size, -1)).permute(2, 0, 1, 3), PHASE)
    inclusive = columns.cumsum(dim=0, dtype=torch.int32)
    both = torch.stack([inclusive - columns, inclusive[-1:].expand_as(inclusive)], dim=1)
    columns_of_ranks = comm.all_to_all(both, PHASE)  # [P, 2, BH, R, K / P]
    preceding, sizes = (
        columns_of_ranks.permute(1, 2, 3, 0, 4).reshape(2, n_heads, n_rounds, -1)[..., :n_buckets].unbind()
    )
    return preceding.contiguous(), sizes.contiguous()


class _LocalTokens:
    """The slots of the local tokens of a group of heads, and the ranks that read them."""

    def __init__(
        self, buckets: Tensor, preceding: Tensor, sizes: Tensor, options: AttentionOptions, seq_len: int, size: int
    ) -> None:
        """buckets [BH, R, S]; preceding, sizes [BH, R, K]: members on the ranks before, and on all ranks."""
        self.buckets, self.sizes, self._size = buckets, sizes, size
        n_heads, n_rounds, n_local = buckets.shape
        self.is_needed = torch.zeros(size, n_heads, n_local, dtype=torch.bool, device=buckets.device)
        """[P, BH, S]: by a rank, as a query or a key."""
        self.is_query = torch.zeros_like(self.is_needed)
        """[P, BH, S]: at a rank."""
        self._readers: list[list[Recipients]] = []
        codes, owners = [], []
        rule = options.rule
        tile_len = choose_tiling(rule, seq_len, options.n_buckets).tile_len
        for r in range(n_rounds):
            bucket = buckets[:, r]
            rank = bucket_ranks(bucket, preceding[:, r])
            if isinstance(rule, ChunkRule):
                owner, readers = chunk_recipients(bucket, rank, sizes[:, r], rule, seq_len, size)
            else:
                owner, readers = window_recipients(bucket, rank, sizes[:, r], rule, tile_len, size)
            self._mark(self.is_query, owner, owner >= 0)
            for some in readers:
                for reader, reads in some.iter_ranks(size):
                    self._mark(self.is_needed, reader, reads)
            self._readers.append(readers)
            owners.append(owner.flatten().to(torch.int32))
            if options.count_pairs_once:
                codes.append(position_codes(bucket, rank, sizes[:, r], rule))
        self.codes = torch.stack(codes, dim=1) if codes else None
        """[BH, R, S]"""
        self.owners = torch.stack(owners)
        """[R, BH * S]"""

    def _mark(self, mask: Tensor, rank: Tensor, reads: Tensor) -> None:
        head, token = reads.nonzero(as_tuple=True)
        mask[rank[head, token], head, token] = True

    def sent_ids(self, reader: Tensor, head: Tensor, token: Tensor, n_buckets: int) -> Tensor:
        """[rows, R] bucket of each sent token, n_buckets in rounds in which the reader does not need it."""
        columns = []
        for r, readers in enumerate(self._readers):
            reads = torch.zeros_like(reader, dtype=torch.bool)
            for some in readers:
                reads |= (some.first[head, token] <= reader) & (reader <= some.last[head, token])
            # between the first and the last reader there may be ranks that own nothing
            n_tiles = readers[0].n_tiles[head, 0]
            reads &= (reader + 1) * n_tiles // self._size > reader * n_tiles // self._size
            columns.append(self.buckets[head, r, token].masked_fill(~reads, n_buckets))
        return torch.stack(columns, dim=1)


def _make_route(
    heads: slice, local: _LocalTokens, options: AttentionOptions, comm: CommGroup, *, keeps_owners: bool
) -> Route:
    """Exchanges with every rank which tokens of these heads each will receive, and their bucket ids."""
    bits = torch.stack([pack_bits(local.is_needed), pack_bits(local.is_query)], dim=1)
    reader, head, token = local.is_needed.nonzero(as_tuple=True)
    ids = local.sent_ids(reader, head, token, options.n_buckets)
    fields = {"ids": (ids.dtype, ids.shape[1])}
    values = {"ids": ids}
    if local.codes is not None:
        fields["codes"] = (torch.int32, ids.shape[1])
        values["codes"] = local.codes[head, :, token]
    record = RowFormat(**fields)
    received_bits = comm.all_to_all(bits, PHASE)
    sent, sent_queries, received, received_queries = (
        Selection.of(both[:, which].contiguous()) for both in (bits, received_bits) for which in (0, 1)
    )
    arrived = comm.all_to_all_v(SplitRows(record.pack(**values), sent.splits, received.splits), PHASE).wait()
    codes = record.field(arrived, "codes").t().contiguous() if local.codes is not None else None
    received_ids = record.field(arrived, "ids").contiguous()
    checksum = _checksum(sent, sent_queries, ids, comm, is_sent=True)
    checksum -= _checksum(received, received_queries, received_ids, comm, is_sent=False)
    owners = local.owners if keeps_owners else None
    selections = (sent, sent_queries, received, received_queries)
    return Route(heads, *selections, received_ids, codes, owners, local.sizes, _wrapped(checksum))


@dataclass(frozen=True)
class ReceivedTokens:
    """The L tokens that this rank received of a route, its own among them."""

    head: Tensor
    """[L] from 0 in the route."""
    positions: Tensor
    """[L] in the whole sequence."""
    query_rows: Tensor
    """Indices of those that are queries here in any round, in order of ranks."""


def received_tokens(route: Route, plan: ExchangePlan) -> ReceivedTokens:
    source, head, token = route.received.mask(plan.n_local).nonzero(as_tuple=True)
    is_query = route.received_queries.mask(plan.n_local)[source, head, token]
    return ReceivedTokens(head, source * plan.n_local + token, is_query.nonzero().squeeze(1))


def received_shard(
    route: Route, tokens: ReceivedTokens, plan: ExchangePlan, head_index: Tensor, comm: CommGroup
) -> Shard:
    """The received tokens as a shard. head_index [B * H]: that of this rank's heads in their step."""
    n_heads, n_rounds, n_buckets = route.bucket_sizes.shape
    return Shard(
        sort_keys=torch.stack(list(_sort_keys(route, tokens.head))).unsqueeze(0),
        n_sort_keys=n_heads * n_buckets,
        head_index=head_index[route.heads][tokens.head],
        seq_len=plan.seq_len,
        positions=tokens.positions,
        position_codes=route.position_codes if n_rounds > 1 else None,
        bucket_sizes=route.bucket_sizes,
        partition=Partition(comm.index, comm.size),
    )


def _sort_keys(route: Route, head: Tensor) -> Iterator[Tensor]:
    """[L] of each round."""
    n_heads, n_rounds, n_buckets = route.bucket_sizes.shape
    for r in range(n_rounds):
        yield row_sort_keys(head, route.bucket_ids[:, r], n_heads, n_buckets)


def _count_mismatches(route: Route, options: AttentionOptions, seq_len: int, n_local: int, comm: CommGroup) -> int:
    """How many tokens were received, or are missing, against what the counts of all ranks predict."""
    part, rule = Partition(comm.index, comm.size), options.rule
    _, head, _ = route.received.mask(n_local).nonzero(as_tuple=True)
    mismatches = 0
    for r, keys in enumerate(_sort_keys(route, head)):
        sizes = route.bucket_sizes[:, r].long()
        counts = torch.bincount(keys, minlength=sizes.numel() + 1)[:-1].view_as(sizes)
        if isinstance(rule, ChunkRule):
            counts = counts.sum(dim=1)
            run = chunk_partition(seq_len, rule, part)
            first = torch.tensor(run.needed, dtype=torch.int64, device=keys.device) * rule.chunk_len
            predicted = (sizes.sum(dim=1, keepdim=True) - first).clamp(0, rule.chunk_len).sum(dim=1)
        else:
            run_of = window_partition(sizes, rule, choose_tiling(rule, seq_len, options.n_buckets).tile_len, part)
            predicted = run_of.stop - run_of.start
        mismatches += int((counts - predicted).abs().sum())
    return mismatches


def _checksum(needed: Selection, queries: Selection, ids: Tensor, comm: CommGroup, *, is_sent: bool) -> int:
    """A checksum of the tokens, and their bucket ids, that this rank sends to or receives from each rank."""
    other = torch.arange(comm.size, device=ids.device)
    pair = comm.index * comm.size + other if is_sent else other * comm.size + comm.index
    of_ids = torch.stack([_weighted_sum(part.flatten()) for part in ids.split(needed.splits)])
    of_bits = [_weighted_sum(selection.bits.flatten(1)) for selection in (needed, queries)]
    return int(((of_ids + 3 * of_bits[0] + 5 * of_bits[1]) * (pair + 1)).sum())


def _wrapped(number: int) -> int:
    """Modulo 2^64, as sums over the ranks are: what should sum to 0 still does."""
    return (number + 2**63) % 2**64 - 2**63


def _weighted_sum(numbers: Tensor) -> Tensor:
    """Sum over the last dimension, weighted by position (modulo 8191)."""
    weights = torch.arange(1, numbers.shape[-1] + 1, device=numbers.device) % 8191
    return (numbers.long() * weights).sum(dim=-1)
