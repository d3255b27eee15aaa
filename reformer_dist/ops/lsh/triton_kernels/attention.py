"""LSH and local attention by the kernels, forward and backward, without host synchronization.

All rounds of a group of heads are one launch, and another merges them. Saved for the backward are the inputs, the
output, the logsumexp, and the order with its tiles: 4 bytes per token, head and round. Reversible layers save none
of these, since they recompute the forward before each backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reformer_dist.ops.lsh.attention import BackwardTensors, ForwardTensors, Shard, WorkspaceShape
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.triton_kernels.hashing import hash_vectors
from reformer_dist.ops.lsh.triton_kernels.launch import HeadGroup
from reformer_dist.ops.lsh.triton_kernels.rowwise import row_products
from reformer_dist.ops.lsh.triton_kernels.tiles import tile_heads, tile_partition
from reformer_dist.ops.lsh.triton_kernels.tuning import GROUP_TOKENS, tuning_of, workspace_bytes

# Heads, or heads x rounds, are the second or third dimension of a grid, whose size CUDA limits.
MAX_HEADS = 2**16 - 1


class TritonBackend:
    """`ops.lsh.attention.Backend` in Triton; q, k and v have one dtype, D is a multiple of 16 up to 128."""

    keeps_order = True

    def __init__(self, options: AttentionOptions, like: Tensor) -> None:
        self._options, self._like = options, like

    @staticmethod
    def with_supported_strides(x: Tensor) -> Tensor:
        """x itself where its last dimension is contiguous, whatever the other strides."""
        return x if x.stride(3) == 1 else x.contiguous()

    @staticmethod
    def hash(
        vectors: Tensor, rotations: Tensor, n_buckets: int, scheme: str, factors: tuple[int, ...] | None
    ) -> Tensor:
        with torch.cuda.device_of(vectors):  # kernels are launched on the current device
            return hash_vectors(vectors, rotations, n_buckets, scheme, factors=factors)

    @staticmethod
    def workspace_bytes(shape: WorkspaceShape) -> float:
        return workspace_bytes(shape)

    def heads_per_group(self, n_rounds: int, seq_len: int) -> int:
        return min(MAX_HEADS // n_rounds, max(1, GROUP_TOKENS // (n_rounds * seq_len)))

    def sort(self, shard: Shard) -> TritonSortedShard:
        with torch.cuda.device_of(self._like):
            return TritonSortedShard(shard, self._options, self._like)

    def row_dot(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.cuda.device_of(a):
            return row_products(a, b)


class TritonSortedShard:
    """`ops.lsh.attention.SortedShard`: the rows of all rounds by (head, bucket, position), in tiles."""

    def __init__(self, shard: Shard, options: AttentionOptions, like: Tensor) -> None:
        tile = tile_heads if shard.is_whole else tile_partition
        tiles = tile(shard, options, largest=tuning_of(like.shape[3], like.dtype).block)
        self._heads = HeadGroup(options, tiles, shard.first_head)

    def attend(self, tensors: ForwardTensors) -> None:
        if tensors.v.numel():  # a rank may have no tokens to attend
            with torch.cuda.device_of(tensors.v):
                self._heads.attend(*tensors)

    def attend_backward(self, tensors: BackwardTensors) -> None:
        if tensors.v.numel():
            with torch.cuda.device_of(tensors.v):
                self._heads.attend_backward(*tensors)
