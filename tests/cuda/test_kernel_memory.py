"""The working memory of the kernels is what planning estimates."""

from __future__ import annotations

import pytest
import torch

from reformer_dist.ops.lsh import AttentionOptions, WindowRule, bucket_attention
from reformer_dist.ops.lsh.attention import WorkspaceShape
from reformer_dist.ops.lsh.backends import workspace_bytes

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize(("n_hashes", "shared"), [(1, True), (3, True), (3, False)])
def test_backward_memory_is_planned(n_hashes, shared):
    shape, n_buckets, rule = (1, 2, 4096, 128), 64, WindowRule(32, True)
    sizes = WorkspaceShape(
        *(shape[1], shape[2], n_hashes, n_buckets, shape[3]),
        element_size=4,
        rule=rule,
        shared_keys=shared,
        count_pairs_once=False,
        dropout=False,
        device="cuda",
    )
    planned = workspace_bytes("triton", sizes)
    q, k, v, d_out = (torch.randn(shape, device="cuda") for _ in range(4))
    leaves = [x.requires_grad_() for x in ((q, v) if shared else (q, k, v))]
    ids = torch.randint(0, n_buckets, (1, 2, n_hashes, shape[2]), dtype=torch.uint8, device="cuda")
    options = AttentionOptions(rule, n_buckets, 1.0, backend="triton")
    before = torch.cuda.memory_allocated()
    out = bucket_attention(q, None if shared else k, v, ids, options)
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(out, leaves, d_out)
    results = [out, out[..., 0], *grads]  # out[..., 0] has the size of lse
    held = torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in results)
    assert held == pytest.approx(planned, rel=0.05)
