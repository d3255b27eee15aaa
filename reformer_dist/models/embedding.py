"""Token and position embeddings. Positions start at standard deviation 1: smaller ones stall training."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from reformer_dist.config import ModelConfig, Position
from reformer_dist.ops.embedding import embedding
from reformer_dist.ops.rotary import BASE


class Float32Embedding(nn.Embedding):
    """Rows of a table in any dtype, as float32; gradients are summed over tokens in float32."""

    def forward(self, input: Tensor) -> Tensor:
        return embedding(input, self.weight)


class TokenEmbedding(nn.Module):
    """Sum of token and position embeddings: [B, S] -> [B, S, dim] float32.

    With config.embedding_dim, both have that width and a linear layer projects their sum to dim.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        # tied weights are initialized small for the head; scaling restores unit deviation for the embedding
        self.scale = math.sqrt(config.embedding_width) if config.tie_embeddings else 1.0
        self.tokens = Float32Embedding(vocab_size, config.embedding_width)
        self.positions = build_positions(config)
        is_factorised = config.embedding_dim is not None
        self.to_dim = nn.Linear(config.embedding_width, config.dim) if is_factorised else None

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens [B, S] and positions [S] or [B, S], all int64."""
        x = self.tokens(tokens) * self.scale
        if self.positions is not None:
            x = x + self.positions(positions)
        return x if self.to_dim is None else self.to_dim(x.to(self.to_dim.weight.dtype)).float()


def check_length(config: ModelConfig, n_tokens: int) -> None:
    """Raises ValueError if the positions allow fewer tokens."""
    if config.max_positions is not None and n_tokens > config.max_positions:
        raise ValueError(f"{n_tokens} tokens: this model's positions allow at most {config.max_positions}")


def build_positions(config: ModelConfig) -> nn.Module | None:
    """Module that maps positions [..., S] to vectors [..., S, embedding_width].

    None for rotary positions, which act on queries and keys.
    """
    if config.position is Position.axial:
        return AxialPositions(config.axial_shape, config.resolved_axial_dims, is_sum=config.compat.axial_sum)
    if config.position is Position.learned:
        return LearnedPositions(config.max_seq_len, config.embedding_width)
    if config.position is Position.sinusoidal:
        return SinusoidalPositions(config.embedding_width)
    return None


class AxialPositions(nn.Module):
    """Axial position embeddings: position p is a grid cell whose coordinates are embedded (paper, section 4).

    The embeddings of the coordinates are concatenated, or added with is_sum.
    """

    def __init__(self, shape: list[int], dims: list[int], *, is_sum: bool = False) -> None:
        super().__init__()
        self.shape, self.is_sum = list(shape), is_sum
        sides = zip(shape, dims, strict=True)
        self.tables = nn.ParameterList(nn.Parameter(torch.empty(side, dim)) for side, dim in sides)

    def forward(self, positions: Tensor) -> Tensor:
        embedded = []
        rest = positions
        for side, table in zip(reversed(self.shape), reversed(list(self.tables)), strict=True):
            embedded.append(embedding(rest % side, table))
            rest = rest // side
        if self.is_sum:
            return torch.stack(embedded).sum(dim=0)
        return torch.cat(embedded[::-1], dim=-1)


class LearnedPositions(nn.Module):
    """A trainable table with one row per position."""

    def __init__(self, max_seq_len: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(max_seq_len, dim))

    def forward(self, positions: Tensor) -> Tensor:
        return embedding(positions, self.table)


class SinusoidalPositions(nn.Module):
    """Fixed sines and cosines of decreasing frequency (arXiv 1706.03762, section 3.5), for any length."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, positions: Tensor) -> Tensor:
        half = (self.dim + 1) // 2
        exponent = torch.arange(half, dtype=torch.float32, device=positions.device) / half
        angles = positions.float().unsqueeze(-1) * BASE**-exponent
        return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., : self.dim]
