"""Attention tile by tile in plain PyTorch: any device, both neighbour rules, O(R * S * window) time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from reformer_dist.ops.lsh import hashing
from reformer_dist.ops.lsh.attention import Backward, Forward, Shard
from reformer_dist.ops.lsh.online_softmax import PartialSoftmax
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.shared_keys import shared_keys, shared_keys_backward
from reformer_dist.ops.lsh.sorting import count_buckets, full_position_codes, row_sort_keys
from reformer_dist.ops.lsh.torch_tiles.layout import Layout, build_layouts
from reformer_dist.ops.lsh.torch_tiles.pair_mask import Rows
from reformer_dist.ops.lsh.torch_tiles.rounds import RowGroup, attend, attend_backward, attend_rounds
from reformer_dist.ops.workspace import Workspace

# Tokens whose sorted copies exist at a time: they fit the caches of a core.
GROUP_TOKENS = {"cpu": 2**14, "cuda": 2**20}


class TorchBackend:
    """`ops.lsh.attention.Backend` in plain PyTorch."""

    keeps_order = False

    def __init__(self, options: AttentionOptions, like: Tensor) -> None:
        self._options, self._is_cuda = options, like.is_cuda
        self._scratch = Workspace(like.device)

    @staticmethod
    def hash(
        vectors: Tensor, rotations: Tensor, n_buckets: int, scheme: str, factors: tuple[int, ...] | None
    ) -> Tensor:
        return hashing.hash_vectors(vectors, rotations, n_buckets, scheme, factors=factors)

    @staticmethod
    def with_supported_strides(x: Tensor) -> Tensor:
        return x.contiguous()

    def heads_per_group(self, n_rounds: int, seq_len: int) -> int:
        return max(1, GROUP_TOKENS["cuda" if self._is_cuda else "cpu"] // seq_len)

    def sort(self, shard: Shard) -> TorchSortedShard:
        return TorchSortedShard(shard, self._options, self._scratch)

    def row_dot(self, a: Tensor, b: Tensor) -> Tensor:
        size = GROUP_TOKENS["cuda" if self._is_cuda else "cpu"]
        out = torch.empty(a.shape[:3], dtype=torch.float32, device=a.device)
        rows = (x.view(-1, x.shape[3]).split(size) for x in (a, b))
        for target, some_a, some_b in zip(out.view(-1).split(size), *rows, strict=True):
            torch.sum(some_a.float() * some_b.float(), dim=1, out=target)
        return out


class TorchSortedShard:
    """`ops.lsh.attention.SortedShard`: all rounds laid out in tiles."""

    def __init__(self, shard: Shard, options: AttentionOptions, scratch: Workspace) -> None:
        first_row = shard.first_head * shard.sort_keys.shape[2]
        self._rows = slice(first_row, first_row + shard.n_rows)
        rows, layouts = _flat_rows(shard, options), lay_out(shard, options)
        self._group = RowGroup.of(rows, layouts, options, scratch)

    def attend(self, tensors: Forward) -> None:
        q, v = self._flat(tensors.q), self._flat(tensors.v)
        o, lse = attend(self._group, q, self._keys(tensors.k, q), v).output()
        self._flat(tensors.out).copy_(o)
        tensors.lse.view(-1)[self._rows] = lse

    def attend_rounds(self, q: Tensor, k: Tensor | None, v: Tensor) -> Iterator[tuple[Layout, PartialSoftmax]]:
        """Each round's own sums [L, D], in the order of the rounds, and its layout; fills nothing."""
        q, v = self._flat(q), self._flat(v)
        rounds = attend_rounds(self._group, q, self._keys(k, q), v)
        return zip(self._group.layouts, rounds, strict=True)

    def attend_backward(self, tensors: Backward) -> None:
        q, v, d_out = self._flat(tensors.q), self._flat(tensors.v), self._flat(tensors.d_out)
        k = self._keys(tensors.k, q)
        lse, delta = (x.view(-1)[self._rows] for x in (tensors.lse, tensors.delta))
        dq, dk, dv = attend_backward(self._group, q, k, v, d_out, delta=delta, lse=lse)
        if tensors.dk is None:
            dq.add_(shared_keys_backward(q, dk))
        else:
            self._flat(tensors.dk).add_(dk)
        self._flat(tensors.dq).add_(dq)
        self._flat(tensors.dv).add_(dv)

    def _keys(self, k: Tensor | None, q: Tensor) -> Tensor:
        """[N * L, D], for the shard's queries q."""
        return shared_keys(q) if k is None else self._flat(k)

    def _flat(self, x: Tensor) -> Tensor:
        """The shard's rows [N * L, D] of x [B, H, S, D]."""
        return x.view(-1, x.shape[3])[self._rows]


def lay_out(shard: Shard, options: AttentionOptions) -> list[Layout]:
    """The layouts of all rounds, for rows head by head."""
    if shard.bucket_sizes is not None:
        keys = list(shard.sort_keys[0])
        return build_layouts(keys, shard.bucket_sizes, shard.seq_len, options, shard.partition)
    n_heads, n_rounds, seq_len = shard.sort_keys.shape
    head = torch.arange(n_heads, device=shard.sort_keys.device).repeat_interleave(seq_len)
    keys = [
        row_sort_keys(head, shard.sort_keys[:, r].flatten(), n_heads, shard.n_sort_keys) for r in range(n_rounds)
    ]
    sizes = count_buckets(shard.sort_keys, shard.n_sort_keys)
    return build_layouts(keys, sizes, shard.seq_len, options, shard.partition)


def _flat_rows(shard: Shard, options: AttentionOptions) -> Rows:
    if shard.positions is not None:
        return Rows(shard.head_index, shard.positions, shard.position_codes)
    n_heads, n_rounds, seq_len = shard.sort_keys.shape
    positions = torch.arange(seq_len, device=shard.sort_keys.device).repeat(n_heads)
    codes = None
    if options.count_pairs_once and n_rounds > 1:
        codes = full_position_codes(shard.sort_keys, shard.n_sort_keys, options.rule).flatten(1)
    return Rows(shard.head_index.repeat_interleave(seq_len), positions, codes)
