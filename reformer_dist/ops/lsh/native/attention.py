"""LSH and local attention under the window rule by the C library, and its `rotation` hash."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from reformer_dist.ops.lsh import hashing
from reformer_dist.ops.lsh.attention import BackwardTensors, ForwardTensors, Shard, WorkspaceShape
from reformer_dist.ops.lsh.hashing import LARGEST_FACTOR, bucket_dtype, bucket_factors
from reformer_dist.ops.lsh.native.calls import (
    AttentionCall,
    address,
    check_dim,
    hash_rows,
    order_rows,
    row_dot,
    window_of,
)
from reformer_dist.ops.lsh.native.library import library
from reformer_dist.ops.lsh.neighbour_rules import WindowRule
from reformer_dist.ops.lsh.online_softmax import LOG2_E
from reformer_dist.ops.lsh.options import AttentionOptions

# Rows whose order, and in half precision float32 copies, exist at a time.
GROUP_TOKENS = 2**14


class NativeBackend:
    """`ops.lsh.attention.Backend` in C; the rule is a WindowRule, D a multiple of 16 up to 256."""

    keeps_order = False
    fills_lone_rows = False

    def __init__(self, options: AttentionOptions, like: Tensor) -> None:
        self._options = options

    @staticmethod
    def with_supported_strides(x: Tensor) -> Tensor:
        return x.contiguous()

    @staticmethod
    def hash(
        vectors: Tensor, rotations: Tensor, n_buckets: int, scheme: str, factors: tuple[int, ...] | None
    ) -> Tensor:
        """As `hashing.hash_vectors`; an id depends on its vector alone, not on lengths or threads."""
        if scheme != "rotation":
            return hashing.hash_vectors(vectors, rotations, n_buckets, scheme, factors=factors)
        batch, n_heads, seq_len, _ = vectors.shape
        ids = torch.empty(batch, n_heads, rotations.shape[1], seq_len, dtype=bucket_dtype(n_buckets), device="cpu")
        if n_buckets == 1:
            return ids.zero_()
        factors = bucket_factors(n_buckets, LARGEST_FACTOR["rotation"]) if factors is None else factors
        hash_rows(vectors.detach().float().contiguous(), rotations.transpose(2, 3).contiguous(), factors, ids)
        return ids

    @staticmethod
    def workspace_bytes(shape: WorkspaceShape) -> float:
        vector, n_grads = shape.head_dim * 4, 2 if shape.shared_keys else 3
        if (rows := shape.n_partition_rows) is not None:
            # received rows are contiguous, but not in float32
            copies = 2 if shape.element_size == 4 else n_grads + 1
            return _order_bytes(shape, shape.n_heads, rows) + rows * (vector * (copies + n_grads) + 12)
        n_heads = min(shape.n_heads, max(1, GROUP_TOKENS // shape.seq_len))
        rows = n_heads * shape.seq_len
        order = _order_bytes(shape, n_heads, rows) + (4 * rows * shape.n_rounds if shape.has_codes else 0)
        sorting = shape.n_rounds * 4 * (rows + n_heads * shape.n_buckets) * (2 if shape.own_keys else 1)
        in_float32 = 0 if shape.element_size == 4 else 6 if shape.shared_keys else 8
        attending = vector * rows * in_float32 + 4 * rows * (3 if shape.shared_keys else 1)
        # the previous group's order is freed after this one's is computed
        return order + max(sorting + (order if n_heads < shape.n_heads else 0), attending)

    def heads_per_group(self, n_rounds: int, seq_len: int) -> int:
        return max(1, GROUP_TOKENS // seq_len)

    def sort(self, shard: Shard) -> NativeSortedShard:
        return NativeSortedShard(shard, self._options)

    def row_dot(self, a: Tensor, b: Tensor) -> Tensor:
        out = torch.empty(a.shape[:3], dtype=torch.float32, device="cpu")
        rows = (x.view(-1, x.shape[3]).split(GROUP_TOKENS) for x in (a, b))
        for target, some_a, some_b in zip(out.view(-1).split(GROUP_TOKENS), *rows, strict=True):
            row_dot(some_a.float(), some_b.float(), target)
        return out


def _order_bytes(shape: WorkspaceShape, n_heads: int, rows: float) -> float:
    """Sorted order of the rows by bucket, and its spans."""
    n_orders = 1 if not shape.own_keys else 4 if shape.has_codes else 3  # with last keys, and codes of queries
    n_runs = rows if shape.documents else n_heads * shape.n_buckets  # at most
    return shape.n_rounds * (4 * n_orders * rows + 16 * n_runs) + (4 * rows if shape.documents else 0)


class NativeSortedShard:
    """`ops.lsh.attention.SortedShard`: the rows of all rounds by (head, bucket, position)."""

    def __init__(self, shard: Shard, options: AttentionOptions) -> None:
        assert isinstance(options.rule, WindowRule)
        row_len = shard.sort_keys.shape[2]
        self._rows = slice(shard.first_head * row_len, shard.first_head * row_len + shard.n_rows)
        queries, is_whole = shard.query_sort_keys, shard.is_whole
        # of a partition with keys of their own, the queries of other ranks are absent
        bounds = None if is_whole or queries is not None else shard.query_bounds(options.rule)
        self._documents = None if shard.document_ids is None else shard.document_ids.contiguous()
        order = order_rows(
            shard.sort_keys, options, shard.n_sort_keys, bounds, queries, self._documents, is_whole=is_whole
        )
        if not is_whole:
            order = replace(order, codes=shard.position_codes, query_codes=shard.query_codes)
        self._order = order
        self._options, self._row_len, self._window = options, row_len, window_of(options, shard.seq_len)
        drops = options.dropout > 0
        self._head_index = shard.head_index.int() if drops and shard.head_index is not None else None
        self._positions = shard.positions.int() if drops and shard.positions is not None else None

    def attend(self, tensors: ForwardTensors) -> None:
        q, k, v, out = (self._float_rows(x) for x in (tensors.q, tensors.k, tensors.v, tensors.out))
        self._call("reformer_attend", (q, k, v, None), out, tensors.lse, None, (None, None, None))
        self._write_back(tensors.out, out)

    def attend_backward(self, tensors: BackwardTensors) -> None:
        inputs = [self._float_rows(x) for x in (tensors.q, tensors.k, tensors.v, tensors.d_out)]
        grads = [self._float_rows(x) for x in (tensors.dq, tensors.dk, tensors.dv)]
        self._call("reformer_attend_backward", inputs, None, tensors.lse, tensors.delta, grads)
        for target, rows in zip((tensors.dq, tensors.dk, tensors.dv), grads, strict=True):
            self._write_back(target, rows)

    def _call(
        self,
        function: str,
        inputs: Sequence[Tensor | None],
        out: Tensor | None,
        lse: Tensor,
        delta: Tensor | None,
        grads: Sequence[Tensor | None],
    ) -> None:
        """Fills out and lse, or adds to grads; k is None for keys q / |q|, whose gradients are added to dq."""
        options, order, rule, positions = self._options, self._order, self._options.rule, self._positions
        (q, k, v, d_out), (dq, dk, dv) = inputs, grads
        assert isinstance(rule, WindowRule) and q is not None
        lse = lse.view(-1)[self._rows]
        sums = torch.empty_like(lse) if delta is None else delta.view(-1)[self._rows]
        key_scales, along = (torch.empty_like(lse), torch.empty_like(lse)) if k is None else (None, None)
        n_rounds, n_rows = order.order.shape
        n_heads, dim = n_rows // max(1, self._row_len), q.shape[1]
        check_dim(dim)

        def rows_of(**tensors: Tensor | None) -> list[int | None]:
            return [address(name, x, n_rows, dim) for name, x in tensors.items()]

        call = AttentionCall(
            self._row_len, n_heads, n_rounds, dim,
            self._window, rule.causal, rule.sees_self or options.own_keys,  # own keys: see order.last_keys
            order.spans.shape[1], torch.get_num_threads(),
            int(options.dropout * 2**31), options.dropout_seed,
            options.scale * LOG2_E, 1 / (1 - options.dropout),
            *order.addresses(n_rounds, n_rows),
            address("document_ids", self._documents, n_heads, self._row_len, dtype=torch.int32),
            address("head_index", self._head_index, n_heads if positions is None else n_rows, dtype=torch.int32),
            address("positions", positions, n_rows, dtype=torch.int32),
            *rows_of(q=q, k=q if k is None else k, v=v, d_out=d_out, out=out),
            address("lse", lse, n_rows), address("delta", sums, n_rows),
            address("key_scales", key_scales, n_rows), address("along", along, n_rows),
            *rows_of(dq=dq, dk=dq if k is None else dk, dv=dv),
        )  # fmt: skip
        getattr(library(), function)(ctypes.byref(call))

    def _float_rows(self, x: Tensor | None) -> Tensor | None:
        """The shard's rows [N * L, D] of x [B, H, S, D]: a view if x is float32, else a copy."""
        return None if x is None else x.view(-1, x.shape[3])[self._rows].float()

    def _write_back(self, x: Tensor | None, rows: Tensor | None) -> None:
        if x is not None and rows is not None and x.dtype != torch.float32:
            x.view(-1, x.shape[3])[self._rows] = rows
