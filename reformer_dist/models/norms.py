"""Pre-norms of sublayers: they read a float32 stream and return the dtype of the sublayer's weights."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from reformer_dist.config import ModelConfig, Norm


class StreamNorm(nn.Module):
    """Layer norm of a float32 stream, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(Tensor(dim).fill_(1.0))
        self.bias = nn.Parameter(Tensor(dim).fill_(0.0))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float(), self.eps)
        return normed.to(self.weight.dtype)

    def scale_output(self, out: Tensor) -> Tensor:
        """Maps the sublayer's output to what is added to the stream."""
        return out


class ScaleNorm(nn.Module):
    """x / |x| times one learned scalar, initially sqrt(dim) (arXiv 1910.05895)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(Tensor(1).fill_(math.sqrt(dim)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        # one factor per token: backward would have to keep a normalized copy
        factor = self.weight.float() / x.norm(dim=-1, keepdim=True).clamp_min(self.eps)
        return (x * factor).to(self.weight.dtype)

    def scale_output(self, out: Tensor) -> Tensor:
        return out


class ReZero(nn.Module):
    """No norm; the sublayer's output is multiplied by one learned scalar, initially 0 (arXiv 2003.04887)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(Tensor(1).fill_(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.weight.dtype)

    def scale_output(self, out: Tensor) -> Tensor:
        return out * self.weight


def build_norm(config: ModelConfig) -> StreamNorm | ScaleNorm | ReZero:
    """The norm of one sublayer."""
    if config.norm is Norm.scale:
        return ScaleNorm(config.dim, config.norm_eps)
    return ReZero() if config.norm is Norm.rezero else StreamNorm(config.dim, config.norm_eps)
