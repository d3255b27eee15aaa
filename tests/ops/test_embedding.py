"""The embedding lookup matches indexing in float32, and its gradient a float32 sum over many tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reformer_dist.ops.embedding import embedding

N_ROWS, DIM = 20, 6


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ids, of which a third is 0, and the table as a leaf."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, N_ROWS, shape, generator=generator)
    ids = ids.masked_fill(torch.rand(shape, generator=generator) < 0.3, 0)
    return ids, torch.randn(N_ROWS, DIM, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (65536,), (16, 4096)], ids=str)
@pytest.mark.parametrize("keeps_float32", [False, True])
def test_rows_and_gradients_are_float32(dtype: torch.dtype, shape: tuple[int, ...], keeps_float32: bool) -> None:
    ids, table = draw(shape, dtype)
    plain = table.detach().double().requires_grad_()
    if keeps_float32:
        table.grad_dtype = torch.float32
    out, right = embedding(ids, table), plain[ids]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), right)
    weights = torch.rand(out.shape, generator=torch.Generator().manual_seed(1))  # all positive, so that sums grow
    (out * weights).sum().backward()
    (right * weights).sum().backward()
    assert table.grad is not None and plain.grad is not None
    assert table.grad.dtype == (torch.float32 if keeps_float32 else dtype)
    tolerance = 1e-5 if table.grad.dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(table.grad.double(), plain.grad, rtol=tolerance, atol=1e-6)


def test_float64_stays_and_gradients_of_gradients_exist() -> None:
    ids, table = draw((7,), torch.float64)
    assert embedding(ids, table).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: embedding(ids, x), table)
    assert torch.autograd.gradgradcheck(lambda x: embedding(ids, x), table)
