"""Who attends which part of the order and who needs which token, against the dense meaning of the rules."""

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
from reformer_dist.ops.lsh.sorting import bucket_ranks, count_buckets, mark_padding


@dataclass(frozen=True)
class Shared:
    """Sequences cut into contiguous slices, one for each rank."""

    case: Case
    size: int
    tile_len: int
    """Of the window rule: a parameter of the runs, whatever `choose_tiling` would choose."""
    cuts: list[int]
    """Where the slices of the ranks 1, 2, ... start; slices may be empty."""

    def buckets(self) -> Tensor:
        """[BH, R, S], n_buckets for padding."""
        _, _, _, ids, mask = self.case.tensors()
        return mark_padding(ids, self.case.options.n_buckets, mask)

    def rounds(self) -> list[Round]:
        buckets = self.buckets()
        return [Round(self, bucket) for bucket in buckets.unbind(1)]


class Round:
    """What the ranks of one round find out by themselves, each from its slice, put together again."""

    def __init__(self, shared: Shared, bucket: Tensor) -> None:
        rule, n_buckets, size = shared.case.options.rule, shared.case.options.n_buckets, shared.size
        self.bucket, self.real, self.rule = bucket, bucket < n_buckets, rule
        slices = list(bucket.tensor_split(shared.cuts, dim=1))
        counts = torch.stack([count_buckets(part.unsqueeze(1), n_buckets)[:, 0] for part in slices])
        self.total = counts.sum(dim=0, dtype=torch.int32)
        """[BH, K]"""
        before = counts.cumsum(dim=0) - counts
        ranks = [bucket_ranks(part, own) for part, own in zip(slices, before, strict=True)]
        self.rank = torch.cat(ranks, dim=1)
        """[BH, S]"""
        owners, taken = [], []
        for part, rank in zip(slices, ranks, strict=True):
            if isinstance(rule, ChunkRule):
                owner, readers = chunk_recipients(part, rank, self.total, rule, bucket.shape[1], size)
            else:
                owner, readers = window_recipients(part, rank, self.total, rule, shared.tile_len, size)
            owners.append(owner)
            taken.append(takers(readers, part.shape, size))
        self.owner = torch.cat(owners, dim=1)
        """[BH, S], -1 for padding."""
        self.taken = torch.cat(taken, dim=2)
        """[P, BH, S]: whether each rank takes the token."""


def takers(readers: list[Recipients], shape: torch.Size, size: int) -> Tensor:
    """bool [P, BH, S] of all that `Recipients.iter_ranks` names."""
    found = torch.zeros(size, *shape, dtype=torch.bool)
    for some in readers:
        for taker, takes in some.iter_ranks(size):
            unit, token = takes.nonzero(as_tuple=True)
            found[taker[unit, token], unit, token] = True
    return found


@st.composite
def shared(draw: st.DrawFn, rules: st.SearchStrategy, n_hashes: int = 1) -> Shared:
    case = draw(cases(rules, longest=150, n_hashes=n_hashes))
    size = draw(st.integers(1, 8))
    if draw(st.booleans()):  # equal slices, the last ones shorter or empty
        n_local = -(-case.seq_len // size)
        cuts = [min(index * n_local, case.seq_len) for index in range(1, size)]
    else:
        cuts = sorted(draw(st.lists(st.integers(0, case.seq_len), min_size=size - 1, max_size=size - 1)))
    return Shared(case, size, draw(st.sampled_from([1, 2, 5, 16, 64])), cuts)


def visible(bucket: Tensor, rule: WindowRule | ChunkRule, mask: Tensor | None = None) -> Tensor:
    """bool [BH, S, S] of one round of ids [BH, S]; mask [BH, S]."""
    return visible_pairs(bucket.view(bucket.shape[0], 1, 1, -1), rule, mask)[:, 0, 0] > 0


def needed(owner: Tensor, sees: Tensor, size: int) -> Tensor:
    """bool [P, BH, S]: the token is attended by the rank, or a query of the rank's sees it."""
    attends = torch.stack([owner == index for index in range(size)])
    seen = (attends.unsqueeze(3) & sees).any(dim=2)
    return attends | seen


def chunk_numbers(bucket: Tensor, chunk_len: int) -> Tensor:
    """[BH, S] number of each token's chunk, padding (whose ids are the highest) included."""
    order = bucket.long().argsort(dim=1, stable=True)
    return order.argsort(dim=1) // chunk_len


@settings(max_examples=60, deadline=None)
@given(shared(st.one_of(window_rules(), chunk_rules())))
def test_ranks_on_slices_are_those_of_the_whole(case: Shared) -> None:
    (found,) = case.rounds()
    nobody_before = torch.zeros_like(found.total)
    whole = bucket_ranks(found.bucket, nobody_before)
    assert torch.equal(found.rank[found.real], whole[found.real])
    # and those are what they are called: members of the bucket that stand before
    same = found.bucket.unsqueeze(2) == found.bucket.unsqueeze(1)
    assert torch.equal(whole, same.tril(-1).sum(dim=2))
    assert torch.equal(found.total.sum(dim=1), found.real.sum(dim=1))


@settings(max_examples=80, deadline=None)
@given(shared(window_rules()))
def test_window_runs_part_the_order(case: Shared) -> None:
    """Each bucket's members are dealt out once, tile by tile, in the order of ranks, and evenly."""
    (found,) = case.rounds()
    runs = [
        window_partition(found.total, found.rule, case.tile_len, Partition(p, case.size)) for p in range(case.size)
    ]
    total = found.total.long()
    edge, n_tiles = torch.zeros_like(total), []
    for run in runs:
        length = run.query_stop - run.query_start
        assert torch.equal(run.total, total) and (length >= 0).all()
        # a run goes on where that of the rank before has ended, on a tile border
        assert torch.equal(run.query_start[length > 0], edge[length > 0])
        assert (run.query_start % case.tile_len == 0).all()
        assert (run.start <= run.query_start).all() and (run.query_stop <= run.stop).all()
        edge += length
        n_tiles.append(((length + case.tile_len - 1) // case.tile_len).sum(dim=1))
    assert torch.equal(edge, total)
    tiles = torch.stack(n_tiles)
    assert torch.equal(tiles.sum(dim=0), ((total + case.tile_len - 1) // case.tile_len).sum(dim=1))
    assert (tiles.amax(dim=0) - tiles.amin(dim=0) <= 1).all()
    for unit in range(total.shape[0]):  # a rank's tiles follow one another in the order of all tiles
        real = found.real[unit]
        by_place = (found.bucket[unit].long() * 1000 + found.rank[unit])[real].argsort()
        assert (found.owner[unit][real][by_place].diff() >= 0).all()


@settings(max_examples=80, deadline=None)
@given(shared(window_rules()))
def test_a_window_owner_is_who_runs_over_the_token(case: Shared) -> None:
    (found,) = case.rounds()
    bucket = found.bucket.long().clamp_max(found.total.shape[1] - 1)
    for index in range(case.size):
        run = window_partition(found.total, found.rule, case.tile_len, Partition(index, case.size))
        start, stop = (edge.gather(1, bucket) for edge in (run.query_start, run.query_stop))
        attends = found.real & (start <= found.rank) & (found.rank < stop)
        assert torch.equal(attends, found.owner == index)


@settings(max_examples=100, deadline=None)
@given(shared(window_rules()))
def test_who_takes_a_token_under_the_window_rule(case: Shared) -> None:
    """A rank takes a token if and only if it attends it, or one of its queries may see it.

    So a token that the rule hides from itself and that nobody else sees goes to its owner alone, and padding to
    nobody. Equality is token by token, not by tiles: between the first and the last rank that takes a token,
    every rank that owns a tile owns a member of the bucket within reach.
    """
    (found,) = case.rounds()
    sees = visible(found.bucket, found.rule, found.real)
    assert torch.equal(found.taken, needed(found.owner, sees, case.size))


@settings(max_examples=100, deadline=None)
@given(shared(window_rules()))
def test_window_runs_foretell_what_arrives(case: Shared) -> None:
    """Of each bucket, the ranks from `start` to before `stop` arrive: so many, and these."""
    (found,) = case.rounds()
    for index, taken in enumerate(found.taken):
        run = window_partition(found.total, found.rule, case.tile_len, Partition(index, case.size))
        marked = found.bucket.masked_fill(~taken, case.case.options.n_buckets).unsqueeze(1)
        arrived = count_buckets(marked, case.case.options.n_buckets)[:, 0]
        assert torch.equal(arrived.long(), run.stop - run.start)
        unit, token = taken.nonzero(as_tuple=True)
        bucket, rank = found.bucket[unit, token].long(), found.rank[unit, token]
        assert (run.start[unit, bucket] <= rank).all() and (rank < run.stop[unit, bucket]).all()


@given(chunk_rules(), st.integers(1, 300), st.integers(1, 8))
def test_chunk_runs_part_the_order(rule: ChunkRule, seq_len: int, size: int) -> None:
    runs = [chunk_partition(seq_len, rule, Partition(index, size)) for index in range(size)]
    n_chunks = rule.n_chunks(seq_len)
    assert [chunk for run in runs for chunk in range(run.start, run.stop)] == list(range(n_chunks))
    lengths = [run.stop - run.start for run in runs]
    assert max(lengths) - min(lengths) <= 1
    for run in runs:
        assert run.n_chunks == n_chunks and run.needed == sorted(set(run.needed))
        assert set(range(run.start, run.stop)) <= set(run.needed) <= set(range(n_chunks))


def padded(buckets: Tensor, case: Shared) -> Tensor:
    """Ids [..., S] with padding behind them, up to the length that the order counts as."""
    rule, seq_len = case.case.options.rule, buckets.shape[-1]
    return F.pad(buckets, (0, rule.round_len(seq_len) - seq_len), value=case.case.options.n_buckets)


def chunk_owners(case: Shared, bucket: Tensor, rule: ChunkRule) -> Tensor:
    """[BH, S] rank whose run holds the token's chunk, padding included."""
    chunk = chunk_numbers(bucket, rule.chunk_len)
    owner = torch.full_like(chunk, -1)
    for index in range(case.size):
        run = chunk_partition(bucket.shape[1], rule, Partition(index, case.size))
        owner[(run.start <= chunk) & (chunk < run.stop)] = index
    return owner


@settings(max_examples=60, deadline=None)
@given(shared(chunk_rules()))
def test_who_takes_a_token_under_the_chunk_rule(case: Shared) -> None:
    """A rank takes a chunk if and only if the chunk is its own, or in sight of one of its own.

    Sight is that of chunks: a rank takes tokens of which causality hides every one from it, and it takes
    neighbours for chunks that hold padding only. So the dense meaning is that of the two-sided rule over all
    tokens, padding included; what is sent is that, less the padding.
    """
    (found,) = case.rounds()
    seq_len = found.bucket.shape[1]
    bucket = padded(found.bucket, case)
    owner = chunk_owners(case, bucket, found.rule)
    assert torch.equal(found.owner, owner[:, :seq_len].masked_fill(~found.real, -1))
    sees = visible(bucket, replace(found.rule, causal=False))
    assert torch.equal(found.taken, needed(owner, sees, case.size)[..., :seq_len] & found.real)


@settings(max_examples=50, deadline=None)
@given(shared(chunk_rules(), n_hashes=3))
def test_wrapped_chunks_of_other_rounds(case: Shared) -> None:
    """Where chunks wrap into the round before, equality is that of the union over the rounds."""
    rounds, buckets = case.rounds(), padded(case.buckets(), case)
    rule = replace(case.case.options.rule, causal=False)
    sees = visible_pairs(buckets.unsqueeze(1), rule)[:, 0] > 0
    owners = [chunk_owners(case, bucket, rule) for bucket in buckets.unbind(1)]
    right = torch.stack([needed(own, sees[:, r], case.size) for r, own in enumerate(owners)]).any(dim=0)
    taken = torch.stack([found.taken for found in rounds]).any(dim=0)
    assert torch.equal(taken, right[..., : taken.shape[-1]] & rounds[0].real)


@settings(max_examples=100, deadline=None)
@given(shared(chunk_rules()))
def test_chunk_runs_foretell_what_arrives(case: Shared) -> None:
    """All real tokens of the needed chunks arrive: each is full but for the last that has any."""
    (found,) = case.rounds()
    rule, n_tokens = found.rule, found.total.sum(dim=1)
    chunk = chunk_numbers(found.bucket, rule.chunk_len)
    for index, taken in enumerate(found.taken):
        run = chunk_partition(found.bucket.shape[1], rule, Partition(index, case.size))
        for unit in range(taken.shape[0]):
            arrived = chunk[unit][taken[unit]].bincount(minlength=run.n_chunks)
            foretold = torch.zeros_like(arrived)
            for number in run.needed:
                foretold[number] = max(0, min(rule.chunk_len, int(n_tokens[unit]) - number * rule.chunk_len))
            assert torch.equal(arrived, foretold)
