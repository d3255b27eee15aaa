"""Owners and recipients of tokens under both rules, against the dense definition of the rules."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import Case, cases, chunk_rules, window_rules
from torch import Tensor

from reformer_dist.ops.lsh import ChunkRule, WindowRule
from reformer_dist.ops.lsh.partition import (
    Partition,
    Recipients,
    chunk_partition,
    chunk_recipients,
    window_partition,
    window_recipients,
)
from reformer_dist.ops.lsh.reference import visible_pairs
from reformer_dist.ops.lsh.sorting import count_buckets, indices_in_bucket, mark_padding


@dataclass(frozen=True)
class ShardedCase:
    """Sequences cut into contiguous slices, one for each rank."""

    case: Case
    size: int
    tile_len: int
    """Window rule: a free parameter here, not that of `choose_tiling`."""
    cuts: list[int]
    """Starts of the slices of ranks 1, 2, ...; slices may be empty."""

    def buckets(self) -> Tensor:
        """[BH, R, S], n_buckets for padding."""
        _, _, _, ids, mask = self.case.tensors()
        return mark_padding(ids, self.case.options.n_buckets, mask)

    def rounds(self) -> list[Round]:
        buckets = self.buckets()
        return [Round(self, bucket) for bucket in buckets.unbind(1)]


class Round:
    """Results that the ranks compute for one round, each from its slice, concatenated."""

    def __init__(self, sharded: ShardedCase, bucket: Tensor) -> None:
        rule, n_buckets, size = sharded.case.options.rule, sharded.case.options.n_buckets, sharded.size
        self.bucket, self.real, self.rule = bucket, bucket < n_buckets, rule
        slices = list(bucket.tensor_split(sharded.cuts, dim=1))
        counts = torch.stack([count_buckets(part.unsqueeze(1), n_buckets)[:, 0] for part in slices])
        self.total = counts.sum(dim=0, dtype=torch.int32)
        """[BH, K]"""
        before = counts.cumsum(dim=0) - counts
        ranks = [indices_in_bucket(part, own) for part, own in zip(slices, before, strict=True)]
        self.rank = torch.cat(ranks, dim=1)
        """[BH, S]"""
        owners, received = [], []
        for part, rank in zip(slices, ranks, strict=True):
            if isinstance(rule, ChunkRule):
                owner, recipients = chunk_recipients(part, rank, self.total, rule, bucket.shape[1], size)
            else:
                owner, recipients = window_recipients(part, rank, self.total, rule, sharded.tile_len, size)
            owners.append(owner)
            received.append(received_mask(recipients, part.shape, size))
        self.owner = torch.cat(owners, dim=1)
        """[BH, S], -1 for padding."""
        self.received = torch.cat(received, dim=2)
        """[P, BH, S]: whether each rank needs the token."""


def received_mask(recipients: list[Recipients], shape: torch.Size, size: int) -> Tensor:
    """bool [P, BH, S] of all ranks yielded by `Recipients.iter_ranks`."""
    found = torch.zeros(size, *shape, dtype=torch.bool)
    for group in recipients:
        for rank, needs in group.iter_ranks(size):
            head, token = needs.nonzero(as_tuple=True)
            found[rank[head, token], head, token] = True
    return found


@st.composite
def sharded_cases(draw: st.DrawFn, rules: st.SearchStrategy, n_hashes: int = 1) -> ShardedCase:
    case = draw(cases(rules, longest=150, n_hashes=n_hashes))
    size = draw(st.integers(1, 8))
    if draw(st.booleans()):  # equal slices, the last ones shorter or empty
        n_local = -(-case.seq_len // size)
        cuts = [min(index * n_local, case.seq_len) for index in range(1, size)]
    else:
        cuts = sorted(draw(st.lists(st.integers(0, case.seq_len), min_size=size - 1, max_size=size - 1)))
    return ShardedCase(case, size, draw(st.sampled_from([1, 2, 5, 16, 64])), cuts)


def visible(bucket: Tensor, rule: WindowRule | ChunkRule, mask: Tensor | None = None) -> Tensor:
    """bool [BH, S, S] of one round of ids [BH, S]; mask [BH, S]."""
    return visible_pairs(bucket.view(bucket.shape[0], 1, 1, -1), rule, mask)[:, 0, 0] > 0


def needed(owner: Tensor, sees: Tensor, size: int) -> Tensor:
    """bool [P, BH, S]: the rank attends the token, or one of its queries attends to it."""
    attends = torch.stack([owner == index for index in range(size)])
    seen = (attends.unsqueeze(3) & sees).any(dim=2)
    return attends | seen


def chunk_indices(bucket: Tensor, chunk_len: int) -> Tensor:
    """[BH, S] chunk of each token, including padding (whose ids are the highest)."""
    order = bucket.long().argsort(dim=1, stable=True)
    return order.argsort(dim=1) // chunk_len


@settings(max_examples=60, deadline=None)
@given(sharded_cases(st.one_of(window_rules(), chunk_rules())))
def test_ranks_of_slices_are_those_of_the_full_sequence(case: ShardedCase) -> None:
    (found,) = case.rounds()
    none_before = torch.zeros_like(found.total)
    full = indices_in_bucket(found.bucket, none_before)
    assert torch.equal(found.rank[found.real], full[found.real])
    # and ranks count the earlier members of the bucket
    same = found.bucket.unsqueeze(2) == found.bucket.unsqueeze(1)
    assert torch.equal(full, same.tril(-1).sum(dim=2))
    assert torch.equal(found.total.sum(dim=1), found.real.sum(dim=1))


@settings(max_examples=80, deadline=None)
@given(sharded_cases(window_rules()))
def test_window_partitions_cover_the_order(case: ShardedCase) -> None:
    """Each member of a bucket has one owner; tiles are assigned in the order of ranks, and evenly."""
    (found,) = case.rounds()
    parts = [
        window_partition(found.total, found.rule, case.tile_len, Partition(p, case.size)) for p in range(case.size)
    ]
    total = found.total.long()
    edge, n_tiles = torch.zeros_like(total), []
    for part in parts:
        length = part.query_stop - part.query_start
        assert torch.equal(part.total, total) and (length >= 0).all()
        # a part starts where that of the previous rank ends, on a tile border
        assert torch.equal(part.query_start[length > 0], edge[length > 0])
        assert (part.query_start % case.tile_len == 0).all()
        assert (part.start <= part.query_start).all() and (part.query_stop <= part.stop).all()
        edge += length
        n_tiles.append(((length + case.tile_len - 1) // case.tile_len).sum(dim=1))
    assert torch.equal(edge, total)
    tiles = torch.stack(n_tiles)
    assert torch.equal(tiles.sum(dim=0), ((total + case.tile_len - 1) // case.tile_len).sum(dim=1))
    assert (tiles.amax(dim=0) - tiles.amin(dim=0) <= 1).all()
    for head in range(total.shape[0]):  # a rank's tiles follow one another in the order of all tiles
        real = found.real[head]
        by_slot = (found.bucket[head].long() * 1000 + found.rank[head])[real].argsort()
        assert (found.owner[head][real][by_slot].diff() >= 0).all()


@settings(max_examples=80, deadline=None)
@given(sharded_cases(window_rules()))
def test_window_owner_is_the_rank_with_the_query(case: ShardedCase) -> None:
    (found,) = case.rounds()
    bucket = found.bucket.long().clamp_max(found.total.shape[1] - 1)
    for index in range(case.size):
        part = window_partition(found.total, found.rule, case.tile_len, Partition(index, case.size))
        start, stop = (edge.gather(1, bucket) for edge in (part.query_start, part.query_stop))
        attends = found.real & (start <= found.rank) & (found.rank < stop)
        assert torch.equal(attends, found.owner == index)


@settings(max_examples=100, deadline=None)
@given(sharded_cases(window_rules()))
def test_recipients_under_the_window_rule(case: ShardedCase) -> None:
    """A rank receives a token if and only if it attends it, or one of its queries may attend to it.

    So a token that no other token attends to goes to its owner only, and padding to no rank. Equality is by token,
    not by tile: between the first and the last recipient of a token, every rank that owns a tile owns a member of
    the bucket within reach.
    """
    (found,) = case.rounds()
    sees = visible(found.bucket, found.rule, found.real)
    assert torch.equal(found.received, needed(found.owner, sees, case.size))


@settings(max_examples=100, deadline=None)
@given(sharded_cases(window_rules()))
def test_window_partitions_predict_the_received_tokens(case: ShardedCase) -> None:
    """Of each bucket, exactly the members in [start, stop) are received."""
    (found,) = case.rounds()
    for index, received in enumerate(found.received):
        part = window_partition(found.total, found.rule, case.tile_len, Partition(index, case.size))
        marked = found.bucket.masked_fill(~received, case.case.options.n_buckets).unsqueeze(1)
        arrived = count_buckets(marked, case.case.options.n_buckets)[:, 0]
        assert torch.equal(arrived.long(), part.stop - part.start)
        head, token = received.nonzero(as_tuple=True)
        bucket, rank = found.bucket[head, token].long(), found.rank[head, token]
        assert (part.start[head, bucket] <= rank).all() and (rank < part.stop[head, bucket]).all()


@given(chunk_rules(), st.integers(1, 300), st.integers(1, 8))
def test_chunk_partitions_cover_the_order(rule: ChunkRule, seq_len: int, size: int) -> None:
    parts = [chunk_partition(seq_len, rule, Partition(index, size)) for index in range(size)]
    n_chunks = rule.n_chunks(seq_len)
    assert [chunk for part in parts for chunk in range(part.start, part.stop)] == list(range(n_chunks))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) <= 1
    for part in parts:
        assert part.n_chunks == n_chunks and part.needed == sorted(set(part.needed))
        assert set(range(part.start, part.stop)) <= set(part.needed) <= set(range(n_chunks))


def padded(buckets: Tensor, case: ShardedCase) -> Tensor:
    """Ids [..., S], padded to the length that the order counts as."""
    rule, seq_len = case.case.options.rule, buckets.shape[-1]
    return F.pad(buckets, (0, rule.round_len(seq_len) - seq_len), value=case.case.options.n_buckets)


def chunk_owners(case: ShardedCase, bucket: Tensor, rule: ChunkRule) -> Tensor:
    """[BH, S] rank that owns the token's chunk, including padding."""
    chunk = chunk_indices(bucket, rule.chunk_len)
    owner = torch.full_like(chunk, -1)
    for index in range(case.size):
        part = chunk_partition(bucket.shape[1], rule, Partition(index, case.size))
        owner[(part.start <= chunk) & (chunk < part.stop)] = index
    return owner


@settings(max_examples=60, deadline=None)
@given(sharded_cases(chunk_rules()))
def test_recipients_under_the_chunk_rule(case: ShardedCase) -> None:
    """A rank receives a chunk if and only if the chunk is its own, or within reach of one of its own.

    Reach is by chunk: a rank also receives tokens that causality hides from all its queries, and the neighbours of
    chunks of padding only. So the dense equivalent is the two-sided rule over all tokens, padding included, minus
    the padding.
    """
    (found,) = case.rounds()
    seq_len = found.bucket.shape[1]
    bucket = padded(found.bucket, case)
    owner = chunk_owners(case, bucket, found.rule)
    assert torch.equal(found.owner, owner[:, :seq_len].masked_fill(~found.real, -1))
    sees = visible(bucket, replace(found.rule, causal=False))
    assert torch.equal(found.received, needed(owner, sees, case.size)[..., :seq_len] & found.real)


@settings(max_examples=50, deadline=None)
@given(sharded_cases(chunk_rules(), n_hashes=3))
def test_wrapped_chunks_of_other_rounds(case: ShardedCase) -> None:
    """If chunks wrap into the previous round, equality holds for the union over the rounds."""
    rounds, buckets = case.rounds(), padded(case.buckets(), case)
    rule = replace(case.case.options.rule, causal=False)
    sees = visible_pairs(buckets.unsqueeze(1), rule)[:, 0] > 0
    owners = [chunk_owners(case, bucket, rule) for bucket in buckets.unbind(1)]
    right = torch.stack([needed(own, sees[:, r], case.size) for r, own in enumerate(owners)]).any(dim=0)
    received = torch.stack([found.received for found in rounds]).any(dim=0)
    assert torch.equal(received, right[..., : received.shape[-1]] & rounds[0].real)


@settings(max_examples=100, deadline=None)
@given(sharded_cases(chunk_rules()))
def test_chunk_partitions_predict_the_received_tokens(case: ShardedCase) -> None:
    """All real tokens of the needed chunks are received; each is full except the last that has any."""
    (found,) = case.rounds()
    rule, n_tokens = found.rule, found.total.sum(dim=1)
    chunk = chunk_indices(found.bucket, rule.chunk_len)
    for index, received in enumerate(found.received):
        part = chunk_partition(found.bucket.shape[1], rule, Partition(index, case.size))
        for head in range(received.shape[0]):
            arrived = chunk[head][received[head]].bincount(minlength=part.n_chunks)
            expected = torch.zeros_like(arrived)
            for number in part.needed:
                expected[number] = max(0, min(rule.chunk_len, int(n_tokens[head]) - number * rule.chunk_len))
            assert torch.equal(arrived, expected)
