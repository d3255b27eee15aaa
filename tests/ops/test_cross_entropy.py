"""Chunked cross entropy matches torch's: value and gradients, for any chunk size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reformer_dist.ops.cross_entropy import IGNORE_INDEX, chunked_cross_entropy

DIM, VOCAB = 12, 31


def draw(n: int, dtype: torch.dtype, ignored: float, has_bias: bool, seed: int) -> tuple[list[Tensor], Tensor]:
    """[hidden, weight, bias] as leaves, and labels."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, DIM), (VOCAB, DIM), (VOCAB,)][: 3 if has_bias else 2]
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    labels = torch.randint(0, VOCAB, (n,), generator=generator)
    return leaves, labels.masked_fill(torch.rand(n, generator=generator) < ignored, IGNORE_INDEX)


def plain(leaves: list[Tensor], labels: Tensor) -> Tensor:
    hidden, weight, *bias = (x.float() for x in leaves)
    logits = F.linear(hidden, weight, bias[0] if bias else None)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def chunked(leaves: list[Tensor], labels: Tensor, chunk: int) -> Tensor:
    hidden, weight, *bias = leaves
    return chunked_cross_entropy(hidden, weight, bias[0] if bias else None, labels, chunk)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 50),
    chunk=st.integers(1, 60),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    has_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients(n: int, chunk: int, ignored: float, has_bias: bool, seed: int) -> None:
    leaves, labels = draw(n, torch.float32, ignored, has_bias, seed)
    losses = chunked(leaves, labels, chunk), plain(leaves, labels)
    assert losses[0].dtype == torch.float32 and losses[0].shape == ()
    torch.testing.assert_close(*losses)
    # a scaled loss, as in the engine
    found, expected = (torch.autograd.grad(loss * 0.37, leaves) for loss in losses)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_bf16() -> None:
    leaves, labels = draw(200, torch.bfloat16, 0.2, True, seed=0)
    losses = chunked(leaves, labels, 33), plain(leaves, labels)
    torch.testing.assert_close(*losses, atol=0, rtol=0.01)
    for found, expected in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - expected).float().norm() <= 0.02 * expected.float().norm()


def test_only_wanted_gradients_and_none_in_evaluation() -> None:
    leaves, labels = draw(20, torch.float32, 0.0, True, seed=0)
    leaves[1].requires_grad_(False)
    chunked(leaves, labels, 7).backward()
    assert leaves[0].grad is not None and leaves[1].grad is None and leaves[2].grad is not None
    with torch.no_grad():
        assert not chunked(leaves, labels, 7).requires_grad


class LargestNumel(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


@pytest.mark.parametrize("chunk", [16, 100])
def test_logits_of_all_tokens_never_exist(chunk: int) -> None:
    leaves, labels = draw(1000, torch.float32, 0.1, True, seed=0)
    with LargestNumel() as largest:
        chunked(leaves, labels, chunk).backward()
    assert largest.numel == max(1000 * DIM, chunk * VOCAB)
