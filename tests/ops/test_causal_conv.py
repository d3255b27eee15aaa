"""The causal depthwise convolution against PyTorch's, and documents against each alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reformer_dist.ops.causal_conv import causal_conv

LENGTHS = [3, 1, 7]


def draw(width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2, sum(LENGTHS), 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(width, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def by_torch(x: Tensor, weight: Tensor) -> Tensor:
    padded = F.pad(x.transpose(1, 2), (len(weight) - 1, 0))
    return F.conv1d(padded, weight.flip(0).t().unsqueeze(1), groups=weight.shape[1]).transpose(1, 2)


@pytest.mark.parametrize("seq_len", [1, 2, sum(LENGTHS)])
@pytest.mark.parametrize("width", [2, 3, 8])
def test_output_and_gradients_are_those_of_torch(width: int, seq_len: int) -> None:
    x, weight = draw(width)
    found, expected = (conv(x[:, :seq_len], weight) for conv in (causal_conv, by_torch))
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(out.sin().sum(), (x, weight)) for out in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_documents_are_as_each_alone() -> None:
    x, weight = draw(4)
    ids = torch.tensor([5, 6, 9]).repeat_interleave(torch.tensor(LENGTHS)).expand(2, -1)
    found = causal_conv(x, weight, ids)
    alone = torch.cat([by_torch(part, weight) for part in x.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(found, alone)
    for ours, theirs in zip(
        *(torch.autograd.grad(out.sin().sum(), (x, weight)) for out in (found, alone)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradients_can_be_differentiated() -> None:
    assert torch.autograd.gradgradcheck(causal_conv, draw(3))


@pytest.mark.parametrize("is_autocast", [False, True])
def test_bf16_is_rounded_once(is_autocast: bool) -> None:
    """A running sum of 1, 2**-9 and -1 in bf16 would be 0."""
    x = torch.ones(1, 3, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0], [2**-9], [-1.0]], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        out = causal_conv(x, weight)
    assert out.dtype == torch.bfloat16 and out[0, 2, 0].item() == 2**-9
    d_x, d_weight = torch.autograd.grad(out.sum(), (x, weight))
    assert (d_x.dtype, d_weight.dtype) == (torch.bfloat16, torch.float32)
    assert d_x[0, 0, 0].item() == 2**-9 and d_weight.flatten().tolist() == [3.0, 2.0, 1.0]
