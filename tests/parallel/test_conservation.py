"""Bucket exchange between ranks that are threads: results, traffic, and detection of misrouted tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.threads import ThreadCommGroup, on_ranks
from torch import Tensor

from reformer_dist.errors import TrainingError
from reformer_dist.ops.lsh import AttentionOptions, ChunkRule, WindowRule, bucket_attention
from reformer_dist.ops.lsh.sorting import count_buckets, mark_padding
from reformer_dist.parallel import exchange_plan as plans
from reformer_dist.parallel.bucket_exchange import BucketExchange, exchanged_attention
from reformer_dist.parallel.exchange_plan import ExchangePlan, make_plan
from reformer_dist.parallel.traffic import LayerShape, bucket_bytes

MISMATCHES = "received tokens differ"
SIZE = 3
FAULTY = 1
N_LOCAL = 64
OPTIONS = AttentionOptions(WindowRule(4, causal=True), n_buckets=6, scale=0.5)


class MistakenCommGroup(ThreadCommGroup):
    """One rank mistakes a token that it receives for an earlier one that it does not."""

    step = 1

    def all_to_all(self, blocks: Tensor, phase: str) -> Tensor:
        arrived = super().all_to_all(blocks, phase)
        if self.index == FAULTY and blocks.dtype == torch.uint8:
            selected = plans.unpack_bits(arrived, N_LOCAL)  # [P, 2, BH, S]
            is_needed = selected[:, 0].flatten()
            earlier = (is_needed[self.step :] & ~is_needed[: -self.step]).nonzero()[0]
            is_needed[earlier + self.step], is_needed[earlier] = False, True
            needed = plans.pack_bits(is_needed.view_as(selected[:, 0]))
            arrived = torch.stack([needed, arrived[:, 1]], dim=1)
        return arrived


class SimilarlyMistakenCommGroup(MistakenCommGroup):
    """Likewise, with both bits at the same position of two bytes, so the sum of the bytes is unchanged."""

    step = 8


def on_comm_groups(
    action: Callable[[ThreadCommGroup], object], comm: type[ThreadCommGroup] = ThreadCommGroup, size: int = SIZE
) -> list:
    """The result or exception of `action` on each rank; one that fails alone does not block the others."""

    def run(runtime):
        torch.set_num_threads(1)  # each thread has its own number
        try:
            return action(comm(runtime.meeting, runtime.rank))
        except TrainingError:  # all ranks raise it
            raise
        except Exception:
            runtime.meeting.barrier.abort()
            raise

    return on_ranks(size, run)


def whole_ids(seed: int) -> Tensor:
    """[B, H, R, S]"""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, OPTIONS.n_buckets, (2, 2, 3, SIZE * N_LOCAL), generator=draw, dtype=torch.uint8)


def slice_of(x: Tensor, rank: int, dim: int) -> Tensor:
    return x.tensor_split(SIZE, dim=dim)[rank].contiguous()


def slices(seed: int) -> list[Tensor]:
    """[BH, R, S / P] of each rank."""
    return [mark_padding(slice_of(whole_ids(seed), rank, 3), OPTIONS.n_buckets, None) for rank in range(SIZE)]


def plan_of(
    comm: ThreadCommGroup, buckets: Tensor, options: AttentionOptions = OPTIONS, **settings: bool
) -> ExchangePlan:
    return make_plan(buckets, options, SIZE * N_LOCAL, comm, **settings)


def miscount(held: Tensor, counted: Tensor) -> Callable[[Tensor, int], Tensor]:
    """A `count_buckets` that counts other ids in place of those that a rank holds."""
    return lambda buckets, n_buckets: count_buckets(counted if buckets is held else buckets, n_buckets)


def all_raise(results: list, words: str) -> None:
    assert [type(result) for result in results] == [TrainingError] * SIZE, results
    assert len({str(result) for result in results}) == 1
    assert words in str(results[0])


@pytest.mark.parametrize(
    ("options", "shared", "per_round", "padded"),
    [
        (OPTIONS, True, False, True),
        (replace(OPTIONS, rule=WindowRule(5, causal=False), dropout=0.2), False, True, False),
        (replace(OPTIONS, rule=ChunkRule(7, causal=True, wrap=True)), True, False, True),
    ],
    ids=["window", "two-sided window", "chunks"],
)
def test_slices_are_the_whole(
    options: AttentionOptions, shared: bool, per_round: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients, with one message per head and with one message for all heads."""
    draw = torch.Generator().manual_seed(0)
    vectors = [torch.randn(2, 2, SIZE * N_LOCAL, 5, generator=draw) for _ in range(2 if shared else 3)]
    d_out = torch.randn(vectors[0].shape, generator=draw)
    mask = torch.rand(2, SIZE * N_LOCAL, generator=draw) < (0.7 if padded else 1.1)
    ids = whole_ids(0)

    def attend(leaves: list[Tensor], d_out: Tensor, action: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in leaves]
        out = action(leaves[0], None if shared else leaves[1], leaves[-1])
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]

    right = attend(vectors, d_out, lambda q, k, v: bucket_attention(q, k, v, ids, options, mask))
    for group_tokens in (N_LOCAL, 2**14):
        monkeypatch.setitem(plans.GROUP_TOKENS, "cpu", group_tokens)

        def on_rank(comm: ThreadCommGroup) -> list[Tensor]:
            own_ids, own_mask = slice_of(ids, comm.index, 3), slice_of(mask, comm.index, 1)
            buckets = mark_padding(own_ids, options.n_buckets, own_mask)
            plan = plan_of(comm, buckets, options, per_round=per_round)
            exchange = BucketExchange(plan, options, comm, per_round=per_round)
            return attend(
                [slice_of(x, comm.index, 2) for x in vectors],
                slice_of(d_out, comm.index, 2),
                lambda q, k, v: exchanged_attention(q, k, v, exchange),
            )

        parts = on_comm_groups(on_rank)
        assert not [part for part in parts if isinstance(part, Exception)]
        for index, whole in enumerate(right):
            found = torch.cat([part[index] for part in parts], dim=2)
            torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


def test_ranks_that_own_nothing_in_some_rounds() -> None:
    """Eight ranks: one round is two tiles of one bucket, the others have a tile for most ranks."""
    size, n_local, options = 8, 3, replace(OPTIONS, rule=WindowRule(20, causal=True))
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(1, 2, size * n_local, 5, generator=draw)
    ids = torch.randint(0, 6, (1, 2, 3, size * n_local), generator=draw, dtype=torch.uint8)
    ids[:, :, 1] = 4

    def on_rank(comm: ThreadCommGroup) -> Tensor:
        here = slice(comm.index * n_local, (comm.index + 1) * n_local)
        plan = make_plan(ids[0, :, :, here], options, size * n_local, comm)
        own = v[:, :, here]
        return exchanged_attention(own, None, own, BucketExchange(plan, options, comm))

    found = torch.cat(on_comm_groups(on_rank, size=size), dim=2)
    torch.testing.assert_close(found, bucket_attention(v, None, v, ids, options), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_sent_match_the_formula(dtype: torch.dtype) -> None:
    """Exactly, given the number of ranks that tokens are sent to; approximately, given its expectation."""
    own = slices(0)
    v = torch.zeros(2, 2, N_LOCAL, 5, dtype=dtype)
    shape = LayerShape(2, N_LOCAL, 2, 5, n_hashes=3, n_buckets=OPTIONS.n_buckets, element_size=dtype.itemsize)

    def on_rank(comm: ThreadCommGroup) -> tuple[float, float, float]:
        plan = plan_of(comm, own[comm.index])
        exchanged_attention(v, None, v, BucketExchange(plan, OPTIONS, comm))
        (route,) = plan.routes
        selections = (route.sent, route.received_queries)
        per_token = [(sum(s.splits) - s.splits[comm.index]) / shape.tokens for s in selections]
        right = bucket_bytes(shape, 1, SIZE, *per_token)
        return sum(comm.stats.bytes_sent.values()), right, bucket_bytes(shape, 1, SIZE)

    for found, right, expected in on_comm_groups(on_rank):
        assert found == pytest.approx(right)
        assert found == pytest.approx(expected, rel=0.35)


@pytest.mark.parametrize("changed", [1, 20, N_LOCAL])
def test_counts_of_other_ids(changed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank counts other ids than it holds for its first tokens: all ranks raise, even for a single token."""
    own, counted = slices(0), slices(0)[FAULTY]
    counted[0, 0, :changed] = (counted[0, 0, :changed] + 1) % OPTIONS.n_buckets
    monkeypatch.setattr(plans, "count_buckets", miscount(own[FAULTY], counted))
    all_raise(on_comm_groups(lambda comm: plan_of(comm, own[comm.index])), MISMATCHES)


@pytest.mark.parametrize("rule", [OPTIONS.rule, ChunkRule(7, causal=True)], ids=["window", "chunk"])
def test_padding_other_than_counted(rule: WindowRule | ChunkRule, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank counts tokens that it then treats as padding."""
    own, counted = slices(0), slices(0)[FAULTY]
    own[FAULTY][:, :, :10] = OPTIONS.n_buckets
    monkeypatch.setattr(plans, "count_buckets", miscount(own[FAULTY], counted))
    options = replace(OPTIONS, rule=rule)
    found = on_comm_groups(lambda comm: plan_of(comm, own[comm.index], options))
    all_raise(found, MISMATCHES)


def test_ids_other_than_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank sends other bucket ids than it has counted."""
    own, sent_ids = slices(0), plans._LocalTokens.sent_ids

    def other_ids(self: plans._LocalTokens, *args: Tensor) -> Tensor:
        ids = sent_ids(self, *args)
        is_faulty = self.buckets.data_ptr() == own[FAULTY].data_ptr()
        return torch.where(ids < OPTIONS.n_buckets, (ids + is_faulty) % OPTIONS.n_buckets, ids)

    monkeypatch.setattr(plans._LocalTokens, "sent_ids", other_ids)
    all_raise(on_comm_groups(lambda comm: plan_of(comm, own[comm.index])), MISMATCHES)


def test_a_rank_with_another_window() -> None:
    own, wider = slices(0), replace(OPTIONS, rule=WindowRule(5, causal=True))
    found = on_comm_groups(lambda comm: plan_of(comm, own[comm.index], wider if comm.index == FAULTY else OPTIONS))
    all_raise(found, MISMATCHES)


@pytest.mark.parametrize("comm", [MistakenCommGroup, SimilarlyMistakenCommGroup])
@pytest.mark.parametrize("rule", [OPTIONS.rule, ChunkRule(7, causal=True)], ids=["window", "chunk"])
def test_a_token_taken_for_another(rule: WindowRule | ChunkRule, comm: type[ThreadCommGroup]) -> None:
    """The buckets match the counts; only the checksums of tokens sent and received differ."""
    own, options = slices(0), replace(OPTIONS, rule=rule)
    found = on_comm_groups(lambda comm: plan_of(comm, own[comm.index], options), comm)
    all_raise(found, "0 received tokens differ")


def test_checksums_of_more_than_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums of many ranks and millions of tokens wrap around, and still detect mismatches."""
    weighted, own = plans._weighted_sum, slices(0)
    for factor in (2**61 + 1, 3**39, 5**27, 7**22):
        monkeypatch.setattr(plans, "_weighted_sum", lambda numbers, factor=factor: weighted(numbers) * factor)
        assert all(
            isinstance(plan, ExchangePlan) for plan in on_comm_groups(lambda comm: plan_of(comm, own[comm.index]))
        )
        all_raise(
            on_comm_groups(lambda comm: plan_of(comm, own[comm.index]), MistakenCommGroup), "checksums sum to "
        )


@pytest.mark.parametrize("rule", [OPTIONS.rule, ChunkRule(7, causal=True)], ids=["window", "chunk"])
def test_a_plan_of_another_call(rule: WindowRule | ChunkRule) -> None:
    """One rank is at another layer, in forward or backward: all ranks raise before they send."""
    first, second, options = slices(0), slices(1), replace(OPTIONS, rule=rule)
    v = torch.ones(2, 2, N_LOCAL, 5, requires_grad=True)

    def attend(comm: ThreadCommGroup, faulty: set[int]) -> Tensor:
        plan = [plan_of(comm, own[comm.index], options) for own in (first, second)]
        exchange = BucketExchange(plan[comm.index in faulty], options, comm)
        return exchanged_attention(v, None, v, exchange)

    words = "plans of the ranks do not match"
    all_raise(on_comm_groups(lambda comm: attend(comm, {FAULTY})), words)
    all_raise(on_comm_groups(lambda comm: attend(comm, {0, 2})), words)

    def both_layers(comm: ThreadCommGroup) -> object:
        outs = attend(comm, set()), attend(comm, {0, 1, 2})
        return torch.autograd.grad(outs[comm.index == FAULTY].sum(), v)

    all_raise(on_comm_groups(both_layers), words)
    fine = on_comm_groups(lambda comm: torch.autograd.grad(attend(comm, {0, 1, 2}).sum(), v)[0].shape)
    assert fine == [v.shape] * SIZE
