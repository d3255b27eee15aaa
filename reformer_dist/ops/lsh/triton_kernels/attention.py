"""LSH and local attention by the kernels, forward and backward, without host synchronization.

All rounds of a group of heads are one launch, and another merges them. Saved for the backward are the inputs, the
output, the logsumexp, and the order with its tiles: 4 bytes per token, head and round. Reversible layers save none
of these, since they recompute the forward before each backward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from reformer_dist.ops.dropout import signed32
from reformer_dist.ops.lsh.attention import BackwardTensors, ForwardTensors, Shard, WorkspaceShape
from reformer_dist.ops.lsh.options import AttentionOptions
from reformer_dist.ops.lsh.triton_kernels import tuning
from reformer_dist.ops.lsh.triton_kernels.backward import attend_round_backward
from reformer_dist.ops.lsh.triton_kernels.forward import attend_round
from reformer_dist.ops.lsh.triton_kernels.hashing import hash_vectors
from reformer_dist.ops.lsh.triton_kernels.own_keys import (
    attend_own_keys,
    own_keys_backward_keys,
    own_keys_backward_queries,
)
from reformer_dist.ops.lsh.triton_kernels.products import INTERPRETED
from reformer_dist.ops.lsh.triton_kernels.rowwise import (
    merge_rounds,
    pack_rows,
    row_products,
    sum_rounds,
)
from reformer_dist.ops.lsh.triton_kernels.tiles import (
    KernelConstants,
    Side,
    tile_heads,
    tile_own_keys,
    tile_partition,
)

# Registers are tuned for Hopper. Before it, tensor cores take every operand from registers, and caps spill them.
HOPPER = 90
# Heads of a group x rounds are dimensions of a grid after the first, whose sizes CUDA limits.
MAX_HEADS = 2**16 - 1


class TritonBackend:
    """`ops.lsh.attention.Backend` in Triton; q, k and v have one dtype, D is a multiple of 16 up to 128."""

    keeps_order = fills_lone_rows = True

    def __init__(self, options: AttentionOptions, like: Tensor) -> None:
        self._options, self._like = options, like

    @staticmethod
    def with_supported_strides(x: Tensor) -> Tensor:
        """x itself if its last dimension is contiguous, whatever the other strides."""
        return x if x.stride(3) == 1 else x.contiguous()

    @staticmethod
    def hash(
        vectors: Tensor, rotations: Tensor, n_buckets: int, scheme: str, factors: tuple[int, ...] | None
    ) -> Tensor:
        with torch.cuda.device_of(vectors):  # kernels are launched on the current device
            return hash_vectors(vectors, rotations, n_buckets, scheme, factors=factors)

    @staticmethod
    def workspace_bytes(shape: WorkspaceShape) -> float:
        return tuning.workspace_bytes(shape)

    def heads_per_group(self, n_rounds: int, seq_len: int) -> int:
        if n_rounds > MAX_HEADS:
            raise ValueError(f"n_hashes={n_rounds}: must be at most {MAX_HEADS} with backend=triton; use torch")
        return min(MAX_HEADS // n_rounds, max(1, tuning.GROUP_TOKENS // (n_rounds * seq_len)))

    def sort(self, shard: Shard) -> TritonSortedShard | OwnKeysSortedShard:
        kind = TritonSortedShard if shard.query_sort_keys is None else OwnKeysSortedShard
        with torch.cuda.device_of(self._like):
            return kind(shard, self._options, self._like)

    def row_dot(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.cuda.device_of(a):
            return row_products(a, b)


class TileLaunch(NamedTuple):
    """One launch of a kernel over tiles."""

    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    """From order_ptr on."""
    flags: dict[str, Any]


class TritonSortedShard:
    """`ops.lsh.attention.SortedShard`: the rows of all rounds by (head, bucket, position), in tiles."""

    def __init__(self, shard: Shard, options: AttentionOptions, like: Tensor) -> None:
        self._options, self._first_head = options, shard.first_head
        self._tuning = tuning.tuning_of(like.shape[3], like.dtype)
        tile = tile_heads if shard.is_whole else tile_partition
        self._tiles = tile(shard, options, self._tuning)
        self._attends_alone = options.attends_alone and shard.is_whole

    def attend(self, tensors: ForwardTensors) -> None:
        q, k, v, out, lse = tensors
        if not v.numel():  # a rank may have no tokens to attend
            return
        with torch.cuda.device_of(v):
            o, round_lse = self._round_buffer(out), self._round_buffer(lse)
            keys = q if k is None else k
            for launch in self._launches(q, shared=k is None, backward=False):
                attend_round[launch.grid](
                    q, keys, v, o, round_lse, *_strides(q, keys, v, out), *launch.arguments, **launch.flags
                )
            if o is not out:
                present, attends_alone = self._tiles.present, self._attends_alone
                merge_rounds(o, round_lse, v, out, lse, self._first_head, present, attends_alone=attends_alone)

    def attend_backward(self, tensors: BackwardTensors) -> None:
        q, k, v, d_out, lse, _, dq, dk, dv, _ = tensors
        if not v.numel():
            return
        with torch.cuda.device_of(v):
            outputs = (dq, dv) if dk is None else (dq, dv, dk)
            buffers = [self._round_buffer(output) for output in outputs]
            read = (q, q if k is None else k, v, d_out)
            # without dk, the kernel does not write to its pointer
            written, written_strides = ((x[0], x[-1], x[1]) for x in (buffers, outputs))
            packed = _pack(tensors, self._options, self._tiles.order.shape[0], self._first_head)
            for launch in self._launches(q, shared=k is None, backward=True):
                attend_round_backward[launch.grid](
                    *read, packed, *written, *_strides(*read, *written_strides), *launch.arguments, **launch.flags
                )
            if buffers[0] is not dq:
                present, attends_alone = self._tiles.present, self._attends_alone
                first = self._first_head
                sum_rounds(buffers, outputs, lse, d_out, first, present, attends_alone=attends_alone)

    def _round_buffer(self, output: Tensor) -> Tensor:
        return _round_buffer(output, *self._tiles.order.shape[:2])

    def _launches(self, q: Tensor, *, shared: bool, backward: bool) -> Iterator[TileLaunch]:
        """One launch for all tiles, or one for the first tiles of the buckets and one for the others."""
        tiles, split = self._tiles, self._tuning.split
        n_rounds, head_dim = tiles.order.shape[1], q.shape[3]
        kinds = {"shared": shared, "sharded": tiles.is_partition}
        if tiles.n_first is None:
            launch = self._tuning.backward if backward else self._tuning.forward
            flags = _flags(self._options, self._tuning, launch, q, tiles.block, n_rounds, **kinds)
            yield TileLaunch(_grid(tiles.table), self._arguments(q, tiles.table), flags)
            return
        assert split is not None
        n_heads, n_rounds, n_entries, _ = tiles.table.shape
        listed = tiles.table[:, :, tiles.n_first :]
        # a bucket has less than one tile in the list on average; programs take turns if there are more
        n_programs = min(tiles.n_first, n_entries - tiles.n_first)
        for size, table, n, place in (
            (split.first, tiles.table, tiles.n_first, {"is_first": True}),
            (split.tail, listed, n_programs, {"listed": True}),
        ):
            launch = size.backward if backward else size.forward
            constants = KernelConstants.of(
                self._options, size.block, size.other_block, head_dim, n_rounds, **kinds, **place
            )
            yield TileLaunch((n, n_rounds, n_heads), self._arguments(q, table), _launch_flags(constants, launch))

    def _arguments(self, q: Tensor, table: Tensor) -> tuple[Any, ...]:
        """The arguments of both kernels from order_ptr on."""
        tiles = self._tiles
        optional = (tiles.codes, tiles.token_ids, tiles.document_ids)
        codes, token_ids, documents = (tiles.order if x is None else x for x in optional)
        sizes = _sizes(self._first_head, q, tiles.table, self._options)
        return tiles.order, table, codes, token_ids, documents, *sizes


class OwnKeysSortedShard:
    """`ops.lsh.attention.SortedShard`: rows as queries and as keys, which have buckets of their own."""

    def __init__(self, shard: Shard, options: AttentionOptions, like: Tensor) -> None:
        self._options, self._first_head = options, shard.first_head
        self._tuning = tuning.tuning_of(like.shape[3], like.dtype)
        self._tiles = tile_own_keys(shard, options, self._tuning)

    def attend(self, tensors: ForwardTensors) -> None:
        q, k, v, out, lse = tensors
        assert k is not None
        if not v.numel():
            return
        with torch.cuda.device_of(v):
            o, round_lse = self._round_buffer(out), self._round_buffer(lse)
            queries = self._tiles.queries
            attend_own_keys[_grid(queries.table)](
                q, k, v, o, round_lse, *_strides(q, k, v, out),
                *self._arguments(q, queries), **self._flags(q, self._tuning.forward),
            )  # fmt: skip
            if o is not out:
                merge_rounds(o, round_lse, v, out, lse, self._first_head, None, attends_alone=False)

    def attend_backward(self, tensors: BackwardTensors) -> None:
        q, k, v, d_out, lse, _, dq, dk, dv, _ = tensors
        assert k is not None and dk is not None
        if not v.numel():
            return
        queries, keys = self._tiles.queries, self._tiles.keys
        with torch.cuda.device_of(v):
            outputs = (dq, dv, dk)
            buffers = [self._round_buffer(output) for output in outputs]
            packed = _pack(tensors, self._options, keys.table.shape[0], self._first_head)
            own_keys_backward_queries[_grid(queries.table)](
                q, k, v, d_out, packed, buffers[0], *_strides(q, k, v, d_out, dq),
                *self._arguments(q, queries), **self._flags(q, self._tuning.backward),
            )  # fmt: skip
            own_keys_backward_keys[_grid(keys.table)](
                q, k, v, d_out, packed, buffers[2], buffers[1], *_strides(q, k, v, d_out, dk, dv),
                *self._arguments(q, keys), **self._flags(q, self._tuning.backward),
            )  # fmt: skip
            if buffers[0] is not dq:
                sum_rounds(buffers, outputs, lse, d_out, self._first_head, None, attends_alone=False)

    def _round_buffer(self, output: Tensor) -> Tensor:
        return _round_buffer(output, *self._tiles.keys.table.shape[:2])

    def _arguments(self, q: Tensor, side: Side) -> tuple[Any, ...]:
        """The arguments of all kernels from queries_ptr on; side: whose tiles the programs have."""
        tiles = self._tiles
        optional = (tiles.queries.codes, tiles.keys.codes, tiles.token_ids, tiles.document_ids)
        pointers = (tiles.keys.planes if x is None else x for x in optional)
        sizes = _sizes(self._first_head, q, side.table, self._options)
        return tiles.queries.planes, tiles.keys.planes, side.table, *pointers, *sizes

    def _flags(self, q: Tensor, launch: tuning.Launch) -> dict[str, Any]:
        tiles = self._tiles
        sizes = (tiles.block, tiles.keys.table.shape[1])
        return _flags(self._options, self._tuning, launch, q, *sizes, shared=False, sharded=tiles.is_partition)


def _pack(tensors: BackwardTensors, options: AttentionOptions, n_heads: int, first_head: int) -> Tensor:
    """`rowwise.pack_rows` of a group of heads."""
    q, delta, d_out, out = tensors.q, tensors.delta, tensors.d_out, tensors.out
    vectors = None
    if delta is None:
        assert out is not None
        vectors = (d_out, out)
    is_shared = tensors.k is None
    return pack_rows(q, tensors.lse, delta, vectors, options.scale, first_head, n_heads, shared=is_shared)


def _round_buffer(output: Tensor, n_heads: int, n_rounds: int) -> Tensor:
    """Buffer of the rounds for an output [B, H, S, ...]: [BH, R, S, ...], or with one round the output."""
    if n_rounds == 1:
        return output
    return torch.empty(n_heads, n_rounds, *output.shape[2:], dtype=output.dtype, device=output.device)


def _grid(table: Tensor) -> tuple[int, int, int]:
    n_heads, n_rounds, n_entries, _ = table.shape
    return n_entries, n_rounds, n_heads


def _sizes(first_head: int, q: Tensor, table: Tensor, options: AttentionOptions) -> tuple[Any, ...]:
    """The arguments of all kernels from first_head on."""
    dropout, seed = options.dropout, options.dropout_seed
    fields = (0, 0, 1.0)  # of pair_mask.Dropout
    if dropout > 0:
        fields = (signed32(seed ^ (seed >> 32)), int(dropout * 2**31), 1 / (1 - dropout))
    return first_head, q.shape[1], q.shape[2], table.shape[2], options.scale, *fields


def _flags(
    options: AttentionOptions,
    of_width: tuning.Tuning,
    launch: tuning.Launch,
    q: Tensor,
    block: int,
    n_rounds: int,
    *,
    shared: bool,
    sharded: bool,
) -> dict[str, Any]:
    other_block = min(of_width.other_block, max(16, block // 2))
    constants = KernelConstants.of(
        options, block, other_block, q.shape[3], n_rounds, shared=shared, sharded=sharded
    )
    return _launch_flags(constants, replace(launch, n_warps=max(1, launch.n_warps * block // of_width.block)))


def _launch_flags(constants: KernelConstants, launch: tuning.Launch) -> dict[str, Any]:
    flags = {"C": constants, "num_warps": launch.n_warps, "num_stages": 1}
    if not INTERPRETED and _capability(driver.active.get_current_device()) >= HOPPER:
        flags["maxnreg"] = launch.max_registers
    return flags


@functools.cache
def _capability(device: int) -> int:
    """Of the current device, as 90; device: its index."""
    return int(driver.active.get_current_target().arch)


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(x.stride()[:3] for x in tensors)
