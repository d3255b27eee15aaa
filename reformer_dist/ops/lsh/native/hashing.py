"""The `rotation` hash by the C library."""

from __future__ import annotations

import torch
from torch import Tensor

from reformer_dist.ops.lsh.hashing import LARGEST_FACTOR, bucket_dtype, bucket_factors
from reformer_dist.ops.lsh.native.calls import hash_rows


def hash_vectors(
    vectors: Tensor, rotations: Tensor, n_buckets: int, *, factors: tuple[int, ...] | None = None
) -> Tensor:
    """As `ops.lsh.hashing.hash_vectors`: D is a multiple of 16 up to 256.

    A vector's id depends on itself alone, to the last bit: on no length, neighbour or thread.
    """
    batch, n_heads, seq_len, _ = vectors.shape
    n_hashes = rotations.shape[1]
    ids = torch.empty(batch, n_heads, n_hashes, seq_len, dtype=bucket_dtype(n_buckets))
    if n_buckets == 1:
        return ids.zero_()
    factors = bucket_factors(n_buckets, LARGEST_FACTOR["rotation"]) if factors is None else factors
    hash_rows(vectors.detach().float().contiguous(), rotations.transpose(2, 3).contiguous(), factors, ids)
    return ids
