"""The plan of a bucket exchange: which tokens are sent to which rank.

It is built in the forward pass, and reused when the forward is recomputed.

Each rank counts its tokens by bucket. An exclusive scan over the ranks counts the members of each bucket that
precede a rank's own, so each rank knows the slots of its tokens in the sorted order of the whole sequence without
holding it. The slots determine the rank that computes attention for a token's query and the ranks that need the
token as a key (`ops.lsh.partition`). A token is sent once to each of them, whatever the number of rounds in which
it is used there.

Sizes: BH (batch row, head) pairs of a route, S local tokens of each, R rounds, K buckets, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.distributed.comm import CommGroup, SplitRows
from reformer_dist.errors import TrainingError
from reformer_dist.ops.lsh.neighbour_rules import ChunkRule, WindowRule
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.partition import (
    Partition,
    Recipients,
    choose_tiling,
    chunk_partition,
    chunk_recipients,
    query_owners,
    window_partition,
    window_recipients,
)
from reformer_dist.ops.lsh.sorting import (
    count_buckets,
    indices_in_bucket,
    last_key_ranks,
    position_codes,
    row_sort_keys,
)
from reformer_dist.parallel.row_format import RowFormat, pack_bits, unpack_bits

PHASE = "plan"
# Local tokens per message: few enough for the next message to overlap with their attention, and for the tokens
# received to fit beside the model.
GROUP_TOKENS = {"cpu": 2**14, "cuda": 2**18}


@dataclass(frozen=True)
class Selection:
    """The local tokens to send to each rank, or the tokens to receive from each."""

    bits: Tensor
    """uint8 [P, BH, S / 8]"""
    splits: list[int]
    """Number of tokens per rank."""

    @staticmethod
    def of(bits: Tensor) -> Selection:
        return Selection(bits, unpack_bits(bits, bits.shape[2] * 8).sum(dim=(1, 2)).tolist())

    def mask(self, n_local: int) -> Tensor:
        """bool [P, BH, S]."""
        return unpack_bits(self.bits, n_local)

    def tokens(self, n_local: int) -> Tensor:
        """Indices in [0, BH * S), rank by rank."""
        return self.mask(n_local).flatten(1).nonzero()[:, 1]


@dataclass(frozen=True)
class Route:
    """What this rank sends and receives for one group of heads; groups are pipelined one after another."""

    heads: slice
    """Of the B * H heads."""
    sent: Selection
    """Local tokens that each rank needs as keys; without own_keys this includes its queries."""
    sent_queries: Selection
    """Local tokens whose queries each rank computes, in at least one round. A subset of `sent` unless own_keys."""
    received: Selection
    """Tokens of each rank that this rank needs as keys; without own_keys this includes its queries."""
    received_queries: Selection
    """Tokens of each rank whose queries this rank computes. A subset of `received` unless own_keys."""
    bucket_ids: Tensor
    """[L, R] of the L received tokens; n_buckets in rounds in which they are not needed here."""
    position_codes: Tensor | None
    """[R, L] with count_pairs_once: see `sorting.position_codes`."""
    owners: Tensor | None
    """int32 [R, BH * S] rank that computes attention for each local query, -1 for padding; only if combined per
    round."""
    bucket_sizes: Tensor
    """int32 [BH, R, K] members of each bucket on all ranks."""
    document_ids: Tensor | None
    """int32 [L] document ids of the received tokens; None unless attention is restricted to the same document."""
    queries: ReceivedMetadata | None
    """Only with own_keys: the same of the received queries. The fields above then describe the keys."""
    checksum: int
    """Checksum of what this rank sends minus that of what it receives: over all ranks they sum to 0."""

    def sort_keys(self, head: Tensor, bucket_ids: Tensor | None = None) -> list[Tensor]:
        """`sorting.row_sort_keys` of the L received tokens in each round; head [L]: their heads, from 0."""
        n_heads, n_rounds, n_buckets = self.bucket_sizes.shape
        ids = self.bucket_ids if bucket_ids is None else bucket_ids
        return [row_sort_keys(head, ids[:, r], n_heads, n_buckets) for r in range(n_rounds)]


@dataclass(frozen=True)
class ReceivedMetadata:
    """Metadata (no vectors) of N received tokens, as keys or as queries."""

    bucket_ids: Tensor
    """[N, R]; n_buckets in rounds in which they are not needed here."""
    position_codes: Tensor | None
    """[R, N] with count_pairs_once."""
    document_ids: Tensor | None
    """int32 [N]"""


@dataclass(frozen=True)
class ExchangePlan:
    """The exchange of one attention call."""

    routes: list[Route]
    seq_len: int
    """Length of the whole sequence."""
    n_local: int
    """Tokens of a sequence on each rank."""
    checksum: int
    """Sum of the checksums of the routes."""


def make_plan(
    buckets: Tensor,
    options: AttentionOptions,
    seq_len: int,
    comm: CommGroup,
    *,
    query_buckets: Tensor | None = None,
    per_round: bool = False,
) -> ExchangePlan:
    """The plan for bucket ids [BH, R, S] of the local tokens of all heads, where n_buckets marks padding.

    query_buckets: bucket ids of the queries, only with options.own_keys; buckets are then those of the keys.
    per_round: rounds will be combined one by one. Raises TrainingError on all ranks if the tokens received are not
    those that the bucket counts predict.
    """
    n_heads, _, n_local = buckets.shape
    documents = options.document_ids
    if documents is not None:
        documents = documents.int().repeat_interleave(n_heads // len(documents), dim=0)
    group_size = max(1, GROUP_TOKENS["cuda" if buckets.is_cuda else "cpu"] // n_local)
    routes, mismatches = [], 0
    with comm.stats.timed(PHASE):
        preceding, sizes = _scan(count_buckets(buckets, options.n_buckets), comm)
        for first in range(0, n_heads, group_size):
            heads = slice(first, min(first + group_size, n_heads))
            queries = buckets if query_buckets is None else query_buckets
            sizes_of = preceding[heads], sizes[heads]
            local = _LocalTokens(buckets[heads], queries[heads], *sizes_of, options, seq_len, comm.size)
            of_heads = None if documents is None else documents[heads]
            routes.append(_make_route(heads, local, of_heads, options, comm, keeps_owners=per_round))
            mismatches += _count_mismatches(routes[-1], options, seq_len, n_local, comm)
        checksum = _wrap_int64(sum(route.checksum for route in routes))
        sums = torch.tensor([mismatches, checksum], device=buckets.device)
        mismatches, difference = comm.all_reduce(sums, PHASE).tolist()
    if mismatches or difference:
        raise TrainingError(
            f"bucket exchange: {mismatches} received tokens differ from what the bucket counts predict (checksums "
            f"sum to {difference}, not 0); the ranks of a sequence disagree about its tokens"
        )
    return ExchangePlan(routes, seq_len, n_local, checksum)


def _scan(counts: Tensor, comm: CommGroup) -> tuple[Tensor, Tensor]:
    """Sums of counts [BH, R, K] over the ranks before this one, and over all ranks.

    Each rank sums K / P of the columns, so no rank holds the counts of all ranks.
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
    """The slots of the local tokens of a group of heads, and the ranks that need them."""

    def __init__(
        self,
        buckets: Tensor,
        query_buckets: Tensor,
        preceding: Tensor,
        bucket_sizes: Tensor,
        options: AttentionOptions,
        seq_len: int,
        n_ranks: int,
    ) -> None:
        """buckets [BH, R, S] of the tokens as keys, and as queries; preceding, bucket_sizes [BH, R, K]: keys on
        earlier and on all ranks."""
        self.buckets, self.query_buckets, self.bucket_sizes = buckets, query_buckets, bucket_sizes
        self._n_ranks = n_ranks
        n_heads, n_rounds, n_local = buckets.shape
        self.is_needed = torch.zeros(n_ranks, n_heads, n_local, dtype=torch.bool, device=buckets.device)
        """[P, BH, S]: whether a rank needs the token as a key. Without own_keys, this includes its queries."""
        self.is_query = torch.zeros_like(self.is_needed)
        """[P, BH, S]: whether the token is a query of a rank in any round."""
        self._recipients: list[list[Recipients]] = []
        codes, query_codes, owners = [], [], []
        rule = options.rule
        tile_len = choose_tiling(rule, seq_len, options.n_buckets).tile_len
        for r in range(n_rounds):
            bucket = buckets[:, r]
            index = indices_in_bucket(bucket, preceding[:, r])
            if isinstance(rule, ChunkRule):
                owner, recipients = chunk_recipients(bucket, index, bucket_sizes[:, r], rule, seq_len, n_ranks)
            else:
                owner, recipients = window_recipients(bucket, index, bucket_sizes[:, r], rule, tile_len, n_ranks)
            if options.own_keys and isinstance(rule, WindowRule):
                of_queries, sizes = query_buckets[:, r], bucket_sizes[:, r]
                last_key = last_key_ranks(of_queries, bucket, preceding[:, r], includes_own=rule.sees_self)
                owner = query_owners(of_queries, last_key, sizes, rule, tile_len, n_ranks)
                query_codes.append(position_codes(of_queries, last_key, sizes, rule))
            self._mark(self.is_query, owner, owner >= 0)
            for ranks in recipients:
                for recipient, is_needed in ranks.iter_ranks(n_ranks):
                    self._mark(self.is_needed, recipient, is_needed)
            self._recipients.append(recipients)
            owners.append(owner.flatten().to(torch.int32))
            if options.count_pairs_once:
                codes.append(position_codes(bucket, index, bucket_sizes[:, r], rule))
        self.codes = torch.stack(codes, dim=1) if codes else None
        """[BH, R, S]"""
        self.query_codes = torch.stack(query_codes, dim=1) if query_codes and codes else None
        """[BH, R, S] of the tokens as queries, if keys have buckets of their own."""
        self.owners = torch.stack(owners)
        """[R, BH * S]"""

    @staticmethod
    def _mark(mask: Tensor, rank: Tensor, where: Tensor) -> None:
        head, token = where.nonzero(as_tuple=True)
        mask[rank[head, token], head, token] = True

    def sent_ids(self, recipient: Tensor, head: Tensor, token: Tensor, n_buckets: int) -> Tensor:
        """[rows, R] bucket of each sent token, n_buckets in rounds in which the recipient does not need it."""
        columns = []
        for r, recipients in enumerate(self._recipients):
            is_needed = torch.zeros_like(recipient, dtype=torch.bool)
            for ranks in recipients:
                is_needed |= (ranks.first[head, token] <= recipient) & (recipient <= ranks.last[head, token])
            # between the first and the last recipient there may be ranks that own nothing
            n_tiles = recipients[0].n_tiles[head, 0]
            is_needed &= (recipient + 1) * n_tiles // self._n_ranks > recipient * n_tiles // self._n_ranks
            columns.append(self.buckets[head, r, token].masked_fill(~is_needed, n_buckets))
        return torch.stack(columns, dim=1)

    def sent_query_ids(self, recipient: Tensor, head: Tensor, token: Tensor, n_buckets: int) -> Tensor:
        """[rows, R] bucket of each sent query, n_buckets in rounds in which the recipient does not compute it."""
        n_heads, _, n_local = self.buckets.shape
        owners = self.owners.view(-1, n_heads, n_local)[:, head, token].t()
        return self.query_buckets[head, :, token].masked_fill(owners != recipient.unsqueeze(1), n_buckets)


def _make_route(
    heads: slice,
    local: _LocalTokens,
    documents: Tensor | None,
    options: AttentionOptions,
    comm: CommGroup,
    *,
    keeps_owners: bool,
) -> Route:
    """Tells each rank which tokens of these heads it will receive, their bucket ids and documents [BH, S]."""
    n_buckets = options.n_buckets
    bits = torch.stack([pack_bits(local.is_needed), pack_bits(local.is_query)], dim=1)
    received_bits = comm.all_to_all(bits, PHASE)
    sent, sent_queries, received, received_queries = (
        Selection.of(both[:, i].contiguous()) for both in (bits, received_bits) for i in (0, 1)
    )
    recipient, head, token = local.is_needed.nonzero(as_tuple=True)
    ids = local.sent_ids(recipient, head, token, n_buckets)
    keys = _send_rows(ids, local.codes, documents, head, token, sent, received, comm)
    checksum = _checksum(sent, sent_queries, ids, comm, is_sent=True)
    checksum -= _checksum(received, received_queries, keys.bucket_ids, comm, is_sent=False)
    queries = None
    if options.own_keys:
        recipient, head, token = local.is_query.nonzero(as_tuple=True)
        ids = local.sent_query_ids(recipient, head, token, n_buckets)
        codes, of_queries = local.query_codes, (sent_queries, received_queries)
        queries = _send_rows(ids, codes, documents, head, token, *of_queries, comm)
        checksum += _checksum(sent_queries, sent_queries, ids, comm, is_sent=True)
        checksum -= _checksum(received_queries, received_queries, queries.bucket_ids, comm, is_sent=False)
    return Route(
        heads,
        sent,
        sent_queries,
        received,
        received_queries,
        keys.bucket_ids,
        keys.position_codes,
        local.owners if keeps_owners else None,
        local.bucket_sizes,
        keys.document_ids,
        queries,
        _wrap_int64(checksum),
    )


def _send_rows(
    ids: Tensor,
    codes: Tensor | None,
    documents: Tensor | None,
    head: Tensor,
    token: Tensor,
    sent: Selection,
    received: Selection,
    comm: CommGroup,
) -> ReceivedMetadata:
    """Sends the bucket ids [rows, R], position codes and documents of rows (head, token), ordered by recipient."""
    fields = {"ids": ids}
    if codes is not None:
        fields["codes"] = codes[head, :, token]
    if documents is not None:
        fields["documents"] = documents[head, token].unsqueeze(1)
    row_format = RowFormat(**{name: (x.dtype, x.shape[1]) for name, x in fields.items()})
    arrived = comm.all_to_all_v(SplitRows(row_format.pack(**fields), sent.splits, received.splits), PHASE).wait()
    return ReceivedMetadata(
        row_format.field(arrived, "ids").contiguous(),
        None if codes is None else row_format.field(arrived, "codes").t().contiguous(),
        None if documents is None else row_format.field(arrived, "documents").flatten(),
    )


def _count_mismatches(route: Route, options: AttentionOptions, seq_len: int, n_local: int, comm: CommGroup) -> int:
    """Number of tokens received in excess of, or missing from, what the counts of all ranks predict."""
    partition, rule = Partition(comm.index, comm.size), options.rule
    _, head, _ = route.received.mask(n_local).nonzero(as_tuple=True)
    mismatches = 0
    for r, keys in enumerate(route.sort_keys(head)):
        sizes = route.bucket_sizes[:, r].long()
        counts = torch.bincount(keys, minlength=sizes.numel() + 1)[:-1].view_as(sizes)
        if isinstance(rule, ChunkRule):
            counts = counts.sum(dim=1)
            needed = chunk_partition(seq_len, rule, partition).needed
            first = torch.tensor(needed, dtype=torch.int64, device="cpu").to(keys.device) * rule.chunk_len
            predicted = (sizes.sum(dim=1, keepdim=True) - first).clamp(0, rule.chunk_len).sum(dim=1)
        else:
            tile_len = choose_tiling(rule, seq_len, options.n_buckets).tile_len
            members = window_partition(sizes, rule, tile_len, partition)
            predicted = members.stop - members.start
        mismatches += int((counts - predicted).abs().sum())
    return mismatches


def _checksum(needed: Selection, queries: Selection, ids: Tensor, comm: CommGroup, *, is_sent: bool) -> int:
    """Checksum of the tokens, with their bucket ids, that this rank sends to or receives from each rank."""
    other = torch.arange(comm.size, device=ids.device)
    pair = comm.index * comm.size + other if is_sent else other * comm.size + comm.index
    of_ids = torch.stack([_weighted_sum(part.flatten()) for part in ids.split(needed.splits)])
    of_bits = [_weighted_sum(selection.bits.flatten(1)) for selection in (needed, queries)]
    return int(((of_ids + 3 * of_bits[0] + 5 * of_bits[1]) * (pair + 1)).sum())


def _wrap_int64(number: int) -> int:
    """The number modulo 2^64, as an all-reduce wraps its sums: sums to 0 stay 0."""
    return (number + 2**63) % 2**64 - 2**63


def _weighted_sum(numbers: Tensor) -> Tensor:
    """Sum over the last dimension, weighted by position (modulo 8191)."""
    weights = torch.arange(1, numbers.shape[-1] + 1, device=numbers.device) % 8191
    return (numbers.long() * weights).sum(dim=-1)
