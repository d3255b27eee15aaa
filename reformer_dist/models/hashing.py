"""The hash of a layer, as its config has it."""

from __future__ import annotations

from torch import Tensor

from reformer_dist.config import ModelConfig
from reformer_dist.ops.lsh import draw_rotations, hash_vectors, seeded_rotations


def hash_heads(vectors: Tensor, config: ModelConfig, seed: int) -> Tensor:
    """Bucket ids [B, H, R, S] of vectors [B, H, S, D], under rotations of a seed, or of config.hash_seed."""
    scheme, implementation = config.hash_scheme.name, config.attention_implementation.name
    factors = None if config.bucket_factors is None else tuple(config.bucket_factors)
    sizes = (vectors.shape[1], vectors.shape[3], config.n_hashes, config.n_buckets)
    if config.hash_seed is not None:
        rotations = seeded_rotations(*sizes, config.hash_seed, factors=factors)
    else:
        rotations = draw_rotations(*sizes, scheme, seed, factors=factors)
    return hash_vectors(
        vectors, rotations, config.n_buckets, scheme, factors=factors, implementation=implementation
    )
