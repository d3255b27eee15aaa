"""Keys of shared query-key attention: k = q / |q| (paper, section 2, "Shared-QK")."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

SMALLEST_NORM = 1e-12


def shared_keys(q: Tensor) -> Tensor:
    """Keys [..., D] of queries [..., D], in their dtype; the norm is computed in float32."""
    return F.normalize(q.float(), dim=-1, eps=SMALLEST_NORM).to(q.dtype)


def shared_keys_backward(q: Tensor, d_keys: Tensor) -> Tensor:
    """Gradient of q from the gradient of its keys [..., D], in float32."""
    q = q.float()
    norm = q.norm(dim=-1, keepdim=True).clamp_min_(SMALLEST_NORM)
    keys = q / norm
    along = (keys * d_keys).sum(dim=-1, keepdim=True)
    return (d_keys - keys * along) / norm
