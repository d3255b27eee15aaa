"""No tensor has size n_hashes * seq_len * head_dim, and what is saved for backward does not grow with rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reformer_dist.ops.lsh import (
    AttentionOptions,
    ChunkRule,
    Rule,
    WindowRule,
    bucket_attention,
    draw_rotations,
    hash_vectors,
)

SEQ_LEN, HEAD_DIM, N_HASHES, N_BUCKETS = 2048, 64, 16, 32
RULES = [WindowRule(64, causal=True), WindowRule(64, causal=False), ChunkRule(64, causal=True)]


class LargestTensor(TorchDispatchMode):
    """Records the largest storage of a float tensor returned by any operation, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.numel = max(self.numel, leaf.numel(), leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


def run(rule: Rule, n_hashes: int, **changed: Any) -> tuple[Tensor, Tensor, Tensor]:
    """One head, hashed and attended; q, k and the output."""
    q = torch.randn(1, 1, SEQ_LEN, HEAD_DIM, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rotations = draw_rotations(1, HEAD_DIM, n_hashes, N_BUCKETS, "rotation", seed=0)
    ids = hash_vectors(q, rotations, N_BUCKETS, "rotation")
    k = torch.nn.functional.normalize(q, dim=-1)
    return q, k, bucket_attention(q, k, q, ids, AttentionOptions(rule, N_BUCKETS, scale=1.0, **changed))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("changed", [{}, {"count_pairs_once": True}, {"dropout": 0.1}], ids=str)
def test_no_tensor_holds_all_rounds(rule: Rule, changed: dict[str, Any], backend: str) -> None:
    with LargestTensor() as largest:
        *_, out = run(rule, N_HASHES, backend=backend, **changed)
        out.sum().backward()
    # the sorted copy of a round may be half empty slots; the scores of a span have a similar size
    assert SEQ_LEN * HEAD_DIM <= largest.numel <= N_HASHES * SEQ_LEN * HEAD_DIM // 4


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_heads_are_processed_in_groups(rule: Rule) -> None:
    """Scratch memory is that of a group, however many heads there are."""
    sizes = []
    for n_heads in (8, 32):
        x = torch.randn(1, n_heads, SEQ_LEN, 4)
        ids = torch.randint(0, N_BUCKETS, (1, n_heads, 2, SEQ_LEN), dtype=torch.uint8)
        with LargestTensor() as largest:
            bucket_attention(x, x, x, ids, AttentionOptions(rule, N_BUCKETS, scale=1.0))
        sizes.append(largest.numel)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.25)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_saved_tensors_do_not_grow_with_rounds(backend: str) -> None:
    saved_sizes = []
    for n_hashes in (1, 16):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            *_, out = run(RULES[0], n_hashes, backend=backend)
        saved_sizes.append(sum(t.numel() for t in saved))
        ids = [t for t in tree_leaves(vars(out.grad_fn.exchange)) if isinstance(t, Tensor)]
        assert sum(t.numel() * t.element_size() for t in ids) == n_hashes * SEQ_LEN
    assert saved_sizes[0] == saved_sizes[1]
