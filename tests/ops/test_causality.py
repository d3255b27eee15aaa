"""The window rule is causal to the last bit, hashing included. The chunk rule leaks, so these tests can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
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

WINDOW = AttentionOptions(WindowRule(16, causal=True), 8, scale=1.0)
CHUNK = replace(WINDOW, rule=ChunkRule(16, causal=True))


def hash_and_attend(q: Tensor, v: Tensor, options: AttentionOptions, scheme: str = "rotation") -> Tensor:
    """Shared query-key attention as a layer does it, over two rounds and one that is local."""
    n_heads, head_dim = q.shape[1], q.shape[3]
    rotations = draw_rotations(n_heads, head_dim, 2, options.n_buckets, scheme, seed=5)
    ids = torch.nn.functional.pad(hash_vectors(q, rotations, options.n_buckets, scheme), (0, 0, 0, 1))
    keys = torch.nn.functional.normalize(q.float(), dim=-1).to(q.dtype)
    return bucket_attention(q, keys, v, ids, options)


def leaks(
    options: AttentionOptions, seq_len: int, dtype: torch.dtype = torch.float32, scheme: str = "rotation"
) -> int:
    """Number of outputs before t that change if q and v change from t on, over several t."""
    generator = torch.Generator().manual_seed(seq_len)
    shape = (1, 3, seq_len, 8)
    q, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    before = hash_and_attend(q, v, options, scheme)
    n_changed = 0
    for t in sorted({0, 1, seq_len // 3, seq_len // 2, seq_len - 17, seq_len - 1}):
        if not 0 <= t < seq_len:
            continue
        # all in one direction: the size of every bucket changes, and one becomes very full
        other_q, other_v = q.clone(), v.clone()
        other_q[:, :, t:] = torch.randn(1, 3, 1, 8, generator=generator).to(dtype)
        other_v[:, :, t:] *= -100
        after = hash_and_attend(other_q, other_v, options, scheme)
        n_changed += int((after[:, :, :t] != before[:, :, :t]).any(-1).sum())
        if t == 0:
            assert not torch.equal(after, before)
    return n_changed


@pytest.mark.parametrize("seq_len", [2, 17, 64, 333, 1000, 5000, 16500])
def test_window_rule_is_strictly_causal(seq_len: int) -> None:
    assert leaks(WINDOW, seq_len) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("window", "once", "dropout"),
    [(1, False, 0.2), (5, True, 0.0), (5, False, 0.2), (70, True, 0.2), (70, False, 0.0)],
)
def test_options_keep_it_causal(dtype: torch.dtype, window: int, once: bool, dropout: float) -> None:
    options = replace(WINDOW, rule=WindowRule(window, causal=True), count_pairs_once=once, dropout=dropout)
    assert leaks(options, 301, dtype) == 0


@pytest.mark.parametrize("scheme", ["rotation", "floor"])
@pytest.mark.parametrize("n_buckets", [1, 2, 64, 256])
def test_hashing_keeps_it_causal(scheme: str, n_buckets: int) -> None:
    assert leaks(replace(WINDOW, n_buckets=n_buckets), 1234, scheme=scheme) == 0


@pytest.mark.parametrize("seq_len", [333, 1000, 5000])
def test_chunk_rule_leaks(seq_len: int) -> None:
    assert leaks(CHUNK, seq_len) > 0


@pytest.mark.parametrize("rule", [WindowRule(16, causal=True), ChunkRule(16, causal=True)])
def test_gradients_are_causal(rule: Rule) -> None:
    """With hashing left out, no gradient flows from an output to a later token, under either rule."""
    q, k, v = (torch.randn(1, 2, 200, 8, requires_grad=True) for _ in range(3))
    ids = torch.randint(0, 8, (1, 2, 3, 200))
    out = bucket_attention(q, k, v, ids, replace(WINDOW, rule=rule))
    grads = torch.autograd.grad(out[:, :, :90].sum(), (q, k, v))
    assert all((grad[:, :, 90:] == 0).all() and (grad[:, :, :90] != 0).any() for grad in grads)
