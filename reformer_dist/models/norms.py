"""Pre-norms of sublayers: they read a float32 stream and return the dtype of the sublayer's weights."""

from __future__ import annotations

import math
from typing import cast

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


class RMSNorm(nn.Module):
    """x over its root mean square, times a learned weight (arXiv 1910.07467), of a float32 stream in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(Tensor(dim).fill_(1.0))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(self.weight.dtype)

    def scale_output(self, out: Tensor) -> Tensor:
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


SublayerNorm = StreamNorm | RMSNorm | ScaleNorm | ReZero


class NormPerLayer(nn.ModuleList):
    """The norms of a sublayer that several layers share: n for layers i, i + n_blocks, i + 2 * n_blocks, ..."""

    def __init__(self, config: ModelConfig) -> None:
        self.n_blocks = config.n_blocks
        n_uses = -(-config.n_layers // config.n_blocks)
        super().__init__(_build_norm(config) for _ in range(n_uses))


def build_norm(config: ModelConfig) -> SublayerNorm | NormPerLayer:
    """The norm of one sublayer, or its norms with compat.norm_per_layer."""
    return NormPerLayer(config) if config.compat.norm_per_layer else _build_norm(config)


def norm_of_layer(norm: nn.Module, layer: int) -> SublayerNorm:
    """The norm of one layer, from what `build_norm` returned."""
    return cast(SublayerNorm, norm[layer // norm.n_blocks] if isinstance(norm, NormPerLayer) else norm)


def build_final_norm(config: ModelConfig) -> StreamNorm | RMSNorm:
    """The norm of a stack's output: RMS norm with norm=rms, otherwise layer norm."""
    return (RMSNorm if config.norm is Norm.rms else StreamNorm)(config.output_dim, config.norm_eps)


def _build_norm(config: ModelConfig) -> SublayerNorm:
    if config.norm is Norm.rezero:
        return ReZero()
    if config.norm is Norm.scale:
        return ScaleNorm(config.dim, config.norm_eps)
    return (RMSNorm if config.norm is Norm.rms else StreamNorm)(config.dim, config.norm_eps)
