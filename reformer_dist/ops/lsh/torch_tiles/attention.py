"""Attention tile by tile in plain PyTorch: any device, both neighbour rules, O(R * S * window) time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from reformer_dist.ops.lsh import hashing
from reformer_dist.ops.lsh.attention import BackwardTensors, ForwardTensors, Shard, WorkspaceShape
from reformer_dist.ops.lsh.neighbour_rules import WindowRule
from reformer_dist.ops.lsh.online_softmax import PartialSoftmax
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.partition import choose_tiling
from reformer_dist.ops.lsh.shared_keys import shared_keys, shared_keys_backward
from reformer_dist.ops.lsh.sorting import count_buckets, full_position_codes, full_query_codes, row_sort_keys
from reformer_dist.ops.lsh.torch_tiles.layout import Layout, build_layouts
from reformer_dist.ops.lsh.torch_tiles.pair_mask import PairMask, Rows
from reformer_dist.ops.lsh.torch_tiles.rounds import RowGroup, attend, attend_backward, attend_rounds
from reformer_dist.ops.lsh.torch_tiles.tiles import SPAN_SLOTS
from reformer_dist.ops.workspace import HEADROOM, Workspace

# Tokens whose sorted copies exist at a time: they fit the caches of a core.
GROUP_TOKENS = {"cpu": 2**14, "cuda": 2**20}
INDEX_BYTES = 8  # of a row or slot


class TorchBackend:
    """`ops.lsh.attention.Backend` in plain PyTorch."""

    keeps_order = False
    fills_lone_rows = False

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

    @staticmethod
    def workspace_bytes(shape: WorkspaceShape) -> float:
        n_heads, rows, previous_group = shape.n_heads, shape.n_partition_rows, 0
        vector = shape.head_dim * 4
        if rows is None:
            n_heads = min(n_heads, max(1, GROUP_TOKENS[shape.device] // shape.seq_len))
            rows = n_heads * shape.seq_len
            previous_group = 0 if n_heads == shape.n_heads else 3 * rows * vector
        tiling = choose_tiling(shape.rule, shape.seq_len, shape.n_buckets)
        tile_len = tiling.tile_len
        width = tiling.n_before + 1 + tiling.n_after
        columns = tile_len * width
        slots = rows
        if isinstance(shape.rule, WindowRule) and shape.n_buckets > 1:
            slots += n_heads * shape.n_buckets * tile_len / 2  # the last tile of a bucket is half empty
        key_slots = slots
        if shape.own_keys:  # queries of each tile of keys fill tiles, with copies of the tiles of their keys
            slots = rows + slots / 2
            key_slots = width * slots
        layouts = shape.n_rounds * (INDEX_BYTES * (max(slots, key_slots) + rows) + 4 * slots * width)
        n_spans = -(-key_slots // SPAN_SLOTS[shape.device])
        span, key_span = slots / n_spans, key_slots / n_spans
        n_blocks = 3 if shape.dropout else 2  # probabilities, after dropout, and their gradients
        # scaled queries; dq, dk, dv by slot
        buffers = vector * (rows + slots + 2 * key_slots) + n_blocks * span * columns * 4
        if shape.documents:  # of the rows and of a column's pairs
            buffers += 4 * rows + (4 + 1 + 4) * span * tile_len
        grads = vector * 3 * rows
        # q, dO, k and v; with several spans also the next one's q and dO
        sorted_copies = vector * ((4 if n_spans > 1 else 2) * span + 2 * key_span)
        keys = vector * rows if shape.shared_keys and shape.n_buckets > 1 else 0  # normalized queries
        in_float32 = 0 if shape.element_size == 4 else vector * 3 * rows  # k, v and dO
        return layouts + HEADROOM * buffers + grads + sorted_copies + keys + in_float32 + previous_group

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
        masks = [PairMask(layout, round_, rows, options) for round_, layout in enumerate(layouts)]
        self._group = RowGroup(options, layouts, masks, scratch)

    def attend(self, tensors: ForwardTensors) -> None:
        q, v = self._flat(tensors.q), self._flat(tensors.v)
        o, lse = attend(self._group, q, self._keys(tensors.k, q), v).output()
        self._flat(tensors.out).copy_(o)
        tensors.lse.view(-1)[self._rows] = lse

    def attend_rounds(self, q: Tensor, k: Tensor | None, v: Tensor) -> Iterator[tuple[Layout, PartialSoftmax]]:
        """Yields the layout and the partial softmax [L, D] of each round, in order."""
        q, v = self._flat(q), self._flat(v)
        rounds = attend_rounds(self._group, q, self._keys(k, q), v)
        return zip(self._group.layouts, rounds, strict=True)

    def attend_backward(self, tensors: BackwardTensors) -> None:
        q, v, d_out = self._flat(tensors.q), self._flat(tensors.v), self._flat(tensors.d_out)
        k = self._keys(tensors.k, q)
        assert tensors.delta is not None
        lse, delta = (x.view(-1)[self._rows] for x in (tensors.lse, tensors.delta))
        dq, dk, dv = attend_backward(self._group, q, k, v, d_out, delta=delta, lse=lse)
        if tensors.dk is None:
            dq.add_(shared_keys_backward(q, dk))
        else:
            self._flat(tensors.dk).add_(dk)
        self._flat(tensors.dq).add_(dq)
        self._flat(tensors.dv).add_(dv)

    def _keys(self, k: Tensor | None, q: Tensor) -> Tensor:
        """The shard's keys [N * L, D]; q: its queries."""
        return shared_keys(q) if k is None else self._flat(k)

    def _flat(self, x: Tensor) -> Tensor:
        """The shard's rows [N * L, D] of x [B, H, S, D]."""
        return x.view(-1, x.shape[3])[self._rows]


def lay_out(shard: Shard, options: AttentionOptions) -> list[Layout]:
    """The layouts of all rounds, for rows head by head."""
    n_heads, n_rounds, seq_len = shard.sort_keys.shape

    def by_round(sort_keys: Tensor) -> list[Tensor]:
        if not shard.is_whole:
            return list(sort_keys[0])
        head = torch.arange(n_heads, device=sort_keys.device).repeat_interleave(seq_len)
        of_rounds = (sort_keys[:, r].flatten() for r in range(n_rounds))
        return [row_sort_keys(head, of_round, n_heads, shard.n_sort_keys) for of_round in of_rounds]

    sizes = shard.bucket_sizes
    if sizes is None:
        sizes = count_buckets(shard.sort_keys, shard.n_sort_keys)
    queries = None if shard.query_sort_keys is None else by_round(shard.query_sort_keys)
    return build_layouts(by_round(shard.sort_keys), sizes, shard.seq_len, options, shard.partition, queries)


def _flat_rows(shard: Shard, options: AttentionOptions) -> Rows:
    documents = None if shard.document_ids is None else shard.document_ids.flatten()
    if shard.positions is not None:
        return Rows(shard.head_index, shard.positions, shard.position_codes, shard.query_codes, documents)
    n_heads, n_rounds, seq_len = shard.sort_keys.shape
    positions = torch.arange(seq_len, device=shard.sort_keys.device).repeat(n_heads)
    codes = query_codes = None
    if options.count_pairs_once and n_rounds > 1:
        keys, n_keys, rule = shard.sort_keys, shard.n_sort_keys, options.rule
        codes = full_position_codes(keys, n_keys, rule).flatten(1)
        if shard.query_sort_keys is not None and isinstance(rule, WindowRule):
            query_codes = full_query_codes(shard.query_sort_keys, keys, n_keys, rule).flatten(1)
    head_index = None if shard.head_index is None else shard.head_index.repeat_interleave(seq_len)
    return Rows(head_index, positions, codes, query_codes, documents)
