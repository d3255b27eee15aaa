"""The kernels on a GPU: real sizes, and no host synchronization.

The small cases of `tests/kernels` run on the GPU too, if there is one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.shards import partition_shards
from torch import Tensor

from reformer_dist.ops.lsh import (
    AttentionOptions,
    ChunkRule,
    Rule,
    WindowRule,
    bucket_attention,
    draw_rotations,
    hash_vectors,
)
from reformer_dist.ops.lsh.attention import BackwardTensors, ForwardTensors
from reformer_dist.ops.lsh.triton_kernels.attention import TritonBackend

pytestmark = pytest.mark.cuda


def run(q: Tensor, v: Tensor, d_out: Tensor, ids: Tensor, rule: Rule, n_buckets: int, name: str) -> list[Tensor]:
    """Output and gradients of q and v."""
    leaves = q.detach().requires_grad_(), v.detach().requires_grad_()
    options = AttentionOptions(rule, n_buckets, 1.0, dropout=0.1, dropout_seed=3, backend=name)
    out = bucket_attention(leaves[0], None, leaves[1], ids, options)
    return [out, *torch.autograd.grad(out, leaves, d_out)]


@pytest.mark.parametrize(
    ("rule", "seq_len"),
    [
        (WindowRule(64, True), 8191),
        (WindowRule(64, True), 8193),  # tiles are split
        (WindowRule(128, False), 8191),
        (ChunkRule(64, True), 8191),
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)]
)
def test_real_sizes(rule, seq_len, head_dim, dtype, tolerance):
    generator = torch.Generator("cuda").manual_seed(0)
    q, v, d_out = (
        torch.randn(2, 4, seq_len, head_dim, device="cuda", dtype=dtype, generator=generator) for _ in range(3)
    )
    ids = hash_vectors(q, draw_rotations(4, head_dim, 4, 128, "rotation", 0), 128, "rotation")
    expected = run(*(x.float() for x in (q, v, d_out)), ids, rule, 128, "torch")
    actual = run(q, v, d_out, ids, rule, 128, "triton")
    again = run(q, v, d_out, ids, rule, 128, "triton")
    for a, b, c in zip(actual, expected, again, strict=True):
        assert torch.equal(a, c)
        assert (a.float() - b).abs().max() <= tolerance * (1 + b.abs().max())


@pytest.mark.parametrize("seq_len", [4096, 8192])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_causality_is_bitwise_in_half_precision(seq_len, head_dim):
    """In buckets of more than a tile, with tiles that are split, and not."""
    draw, edited_from = torch.Generator("cuda").manual_seed(0), seq_len * 2 // 3
    shape = (1, 4, seq_len, head_dim)
    q, v = (torch.randn(shape, device="cuda", generator=draw).bfloat16() for _ in range(2))
    n_buckets = seq_len // 64
    ids = torch.randint(0, n_buckets, (1, 4, 2, seq_len), device="cuda", generator=draw)
    options = AttentionOptions(WindowRule(64, True), n_buckets, 1.0, backend="triton")
    before = bucket_attention(q, None, v, ids, options)
    for x in (q, v):
        x[:, :, edited_from:] = torch.randn_like(x[:, :, edited_from:])
    ids[..., edited_from:] = 1  # later tokens crowd a bucket
    after = bucket_attention(q, None, v, ids, options)
    assert torch.equal(before[:, :, :edited_from], after[:, :, :edited_from])
    assert not torch.equal(before, after)


def test_rows_beyond_32_bit_offsets():
    """v of 3 * 2^30 elements: rows at its end are addressed correctly."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free memory")
    v = torch.zeros(3, 16, 2**19, 128, device="cuda", dtype=torch.bfloat16)
    tail = torch.randn(1, 16, 2**19, 128, device="cuda", dtype=torch.bfloat16)
    v[2:] = tail
    ids = torch.zeros(3, 16, 1, 2**19, device="cuda", dtype=torch.uint8)
    options = AttentionOptions(WindowRule(64, True), 1, 1.0, backend="triton")
    whole = bucket_attention(v, None, v, ids, options)[2:]
    alone = bucket_attention(tail, None, tail, ids[2:], options)
    assert torch.equal(whole, alone)


def test_no_host_sync():
    def step() -> list[Tensor]:
        rotations = draw_rotations(4, 64, 4, 64, "rotation", 0)
        ids = F.pad(hash_vectors(q, rotations, 64, "rotation"), (0, 0, 0, 1))
        options = AttentionOptions(
            WindowRule(64, True), 64, 1.0, count_pairs_once=True, dropout=0.1, dropout_seed=3
        )
        out = bucket_attention(q, None, v, ids, options, mask)
        return list(torch.autograd.grad(out, (q, v), v.detach()))

    q, v = (torch.randn(2, 4, 3000, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    mask = torch.rand(2, 3000, device="cuda") > 0.1
    assert_no_host_sync(step)


def test_shard_without_host_sync():
    ids = torch.randint(0, 64, (2, 4, 4, 3000), generator=torch.Generator().manual_seed(0)).cuda()
    options = AttentionOptions(WindowRule(64, True), 64, 1.0, dropout=0.1, backend="triton")
    part = list(partition_shards(ids, options, None, 3))[1]
    q, v = (torch.randn(1, 1, len(part.row_index), 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def step() -> None:
        order = TritonBackend(options, v).sort(part.shard)
        out, lse = torch.empty_like(v), torch.empty(v.shape[:3], device="cuda")
        order.attend(ForwardTensors(q, None, v, out, lse))
        order.attend_backward(
            BackwardTensors(q, None, v, out, lse, lse, torch.zeros_like(q), None, torch.zeros_like(v))
        )

    assert_no_host_sync(step)


def assert_no_host_sync(step: Callable[[], object]) -> None:
    step()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
