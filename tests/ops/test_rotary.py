"""Rotary embeddings: scores depend on relative positions only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reformer_dist.ops.rotary import rotary_tables, rotate


def rotated(x: Tensor, position: int) -> Tensor:
    return rotate(x, *rotary_tables(torch.tensor([position]), x.shape[-1]))


@pytest.mark.parametrize("head_dim", [2, 6, 64])
def test_products_depend_on_the_distance_alone(head_dim: int) -> None:
    q, k = torch.randn(2, 1, 1, 1, head_dim, generator=torch.Generator().manual_seed(0))
    near, far = ((rotated(q, m) * rotated(k, n)).sum() for m, n in ((7, 3), (107, 103)))
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(near, (rotated(q, 9) * rotated(k, 3)).sum(), atol=1e-3)


def test_rotation_keeps_norms_and_leaves_position_zero_unchanged() -> None:
    x = torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(0))
    out = rotate(x, *rotary_tables(torch.arange(50), 8))
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(out[:, :, 0], x[:, :, 0]) and not torch.allclose(out[:, :, 1], x[:, :, 1])


def test_rotation_in_bf16_is_that_in_float32_rounded() -> None:
    x = torch.randn(1, 1, 50, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    tables = rotary_tables(torch.arange(50), 8)
    assert torch.equal(rotate(x, *tables), rotate(x.float(), *tables).bfloat16())
