"""Bucket exchange on a GPU: three ranks, as threads that share the card, attend by the kernels."""

from __future__ import annotations

import pytest
import torch
from support.threads import ThreadCommGroup, on_ranks
from torch import Tensor

from reformer_dist.ops.lsh import AttentionOptions, WindowRule, bucket_attention
from reformer_dist.ops.lsh.hashing import bucket_dtype
from reformer_dist.ops.lsh.sorting import mark_padding
from reformer_dist.parallel import exchange_plan as plan_module
from reformer_dist.parallel.bucket_exchange import BucketExchange, exchanged_attention
from reformer_dist.parallel.exchange_plan import make_plan

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
SIZE, SEQ_LEN = 3, 3 * 700


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.01)]
)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n_rounds", "n_buckets"), [(4, 30), (1, 1), (3, 3000)])
def test_exchange_equals_one_rank(
    dtype: torch.dtype,
    tolerance: float,
    shared: bool,
    causal: bool,
    n_rounds: int,
    n_buckets: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the rows of a round split over several messages."""
    monkeypatch.setitem(plan_module.GROUP_TOKENS, DEVICE, 2 * SEQ_LEN // SIZE)
    draw = torch.Generator().manual_seed(0)
    vectors = [torch.randn(2, 2, SEQ_LEN, 64, generator=draw).to(DEVICE, dtype) for _ in range(4)]
    ids = torch.randint(0, n_buckets, (2, 2, n_rounds, SEQ_LEN), generator=draw).to(
        DEVICE, bucket_dtype(n_buckets)
    )
    mask = (torch.rand(2, SEQ_LEN, generator=draw) < 0.8).to(DEVICE)
    options = AttentionOptions(WindowRule(64, causal), n_buckets, 0.3, count_pairs_once=True, dropout=0.1)

    def slice_of(x: Tensor, rank: int, dim: int) -> Tensor:
        return x.tensor_split(SIZE, dim=dim)[rank].contiguous()

    def attend(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, action: object) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in ((q, v) if shared else (q, k, v))]
        out = action(leaves[0], None if shared else leaves[1], leaves[-1])
        # on the rank's own thread, since the backward of the other ranks waits for it
        with torch.autograd.set_multithreading_enabled(False):
            return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]

    def on_rank(runtime: object) -> list[Tensor]:
        comm = ThreadCommGroup(runtime.meeting, runtime.rank)
        buckets = mark_padding(slice_of(ids, comm.index, 3), n_buckets, slice_of(mask, comm.index, 1))
        plan = make_plan(buckets, options, SEQ_LEN, comm)
        own = (slice_of(x, comm.index, 2) for x in vectors)
        return attend(*own, lambda q, k, v: exchanged_attention(q, k, v, BucketExchange(plan, options, comm)))

    expected = attend(*vectors, lambda q, k, v: bucket_attention(q, k, v, ids, options, mask))
    parts = on_ranks(SIZE, on_rank)
    assert not [part for part in parts if isinstance(part, Exception)], parts
    for index, whole in enumerate(expected):
        actual = torch.cat([part[index] for part in parts], dim=2)
        assert (actual - whole).abs().max() <= tolerance * max(1.0, whole.abs().max())
