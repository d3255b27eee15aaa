"""Working memory of attention beyond its inputs and outputs, for each backend and for bucket exchange.

"Heads" here are (batch row, head) pairs, which are processed in groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reformer_dist.config import AttentionBackend
from reformer_dist.models.layer_rule import LayerRule
from reformer_dist.ops.lsh.backends import unsupported_reason
from reformer_dist.ops.lsh.native.attention import GROUP_TOKENS as NATIVE_TOKENS
from reformer_dist.ops.lsh.options import ChunkRule, WindowRule
from reformer_dist.ops.lsh.partition import choose_tiling
from reformer_dist.ops.lsh.torch_tiles.attention import GROUP_TOKENS
from reformer_dist.ops.lsh.torch_tiles.tiles import SPAN_SLOTS
from reformer_dist.ops.lsh.triton_kernels.tuning import GROUP_TOKENS as KERNEL_TOKENS
from reformer_dist.ops.lsh.triton_kernels.tuning import tuning_of
from reformer_dist.parallel.exchange_plan import GROUP_TOKENS as EXCHANGE_TOKENS
from reformer_dist.parallel.traffic import mean_other_ranks
from reformer_dist.planning.sizes import JobSpec

INDEX_BYTES = 8  # an index of a row or slot, a head index, a position or a sort key
REUSED_BUFFER_FACTOR = 1.1  # reused buffers are a tenth larger than requested


def workspace(job: JobSpec, layer: LayerRule, n_heads: int, seq_len: int) -> float:
    """Peak working memory in the backward of a layer's attention over `n_heads` whole sequences."""
    if uses_triton(job):
        return triton_backward(job, layer, n_heads, seq_len)
    if uses_native(job, layer):
        return native_backward(job, layer, n_heads, seq_len)
    n_group_heads = min(n_heads, max(1, GROUP_TOKENS[job.device] // seq_len))
    rows = n_group_heads * seq_len
    previous_group = 0 if n_group_heads == n_heads else 3 * rows * job.layer_shape.head_dim * 4
    return torch_backward(job, layer, rows, n_group_heads, seq_len) + previous_group


def uses_triton(job: JobSpec) -> bool:
    """Whether the Triton kernels would run: `ops.lsh.backends.choose` without access to the GPU."""
    backend = job.config.model.attention_backend
    is_selected = backend in (AttentionBackend.auto, AttentionBackend.triton)
    head_dim = job.layer_shape.head_dim
    return is_selected and job.device == "cuda" and head_dim % 16 == 0 and head_dim <= 128


def uses_native(job: JobSpec, layer: LayerRule) -> bool:
    """Whether the C library would run on this machine."""
    backend = job.config.model.attention_backend
    is_selected = backend in (AttentionBackend.auto, AttentionBackend.native)
    chunks = isinstance(layer.rule, ChunkRule)
    head_dim, device = job.layer_shape.head_dim, torch.device("cpu")
    return is_selected and job.device == "cpu" and unsupported_reason("native", device, head_dim, chunks=chunks) is None


def native_backward(job: JobSpec, layer: LayerRule, n_heads: int, seq_len: int) -> float:
    """Backward of a group of heads with the C library: sorted order, row indices and float32 copies."""
    n_group_heads = min(n_heads, max(1, NATIVE_TOKENS // seq_len))
    rows, vector, n_buckets = (
        n_group_heads * seq_len,
        job.layer_shape.head_dim * 4,
        n_group_heads * layer.n_buckets,
    )
    is_counted = job.config.model.count_pairs_once and layer.n_rounds > 1
    order = native_order_bytes(layer, rows, n_buckets) + (4 * rows * layer.n_rounds if is_counted else 0)
    sorting = layer.n_rounds * 4 * (rows + n_buckets)
    in_float32 = 0 if job.layer_shape.element_size == 4 else 6 if layer.shares_keys else 8
    attending = vector * rows * in_float32 + 4 * rows * (3 if layer.shares_keys else 1)
    # the previous group's order is freed after this one's is computed
    return order + max(sorting + (order if n_group_heads < n_heads else 0), attending)


def native_order_bytes(layer: LayerRule, rows: float, n_buckets: int) -> float:
    """Sorted order of the rows by bucket, and its spans."""
    return layer.n_rounds * (4 * rows + 16 * n_buckets)


def triton_backward(job: JobSpec, layer: LayerRule, n_heads: int, seq_len: int) -> float:
    """Backward with the Triton kernels: order, tiles, rowsum(dO * o), and a group's gradients per round."""
    rows = n_heads * seq_len
    group = min(n_heads, max(1, KERNEL_TOKENS // (layer.n_rounds * seq_len)))
    order = triton_order_bytes(job, layer, rows, n_heads * layer.n_buckets)
    return order + 4 * rows + round_gradient_bytes(job, layer, group * seq_len)


def triton_order_bytes(job: JobSpec, layer: LayerRule, rows: float, n_buckets: int) -> float:
    """Sorted order of the rows by bucket, and its tiles."""
    shape = job.layer_shape
    block = tuning_of(shape.head_dim, torch.float32 if shape.element_size == 4 else torch.bfloat16).block
    return layer.n_rounds * (4 * rows + 16 * (rows / block + n_buckets))


def round_gradient_bytes(job: JobSpec, layer: LayerRule, rows: float) -> float:
    """Gradients of the rows for each round, before they are summed."""
    n_gradients = 0 if layer.n_rounds == 1 else 2 if layer.shares_keys else 3
    return rows * layer.n_rounds * n_gradients * job.layer_shape.head_dim * job.layer_shape.element_size


def torch_backward(job: JobSpec, layer: LayerRule, rows: float, n_group_heads: int, seq_len: int) -> float:
    """Backward of a group of rows of head_dim with PyTorch: layouts, sorted copies, accumulators and scores."""
    tiling = choose_tiling(layer.rule, seq_len, layer.n_buckets)
    tile_len = tiling.tile_len
    columns = tile_len * (tiling.n_before + 1 + tiling.n_after)
    slots = rows
    if isinstance(layer.rule, WindowRule) and layer.n_buckets > 1:
        slots += n_group_heads * layer.n_buckets * tile_len / 2  # the last tile of a bucket is half empty
    vector = job.layer_shape.head_dim * 4
    layouts = layer.n_rounds * (INDEX_BYTES * (slots + rows) + 4 * slots * columns / tile_len)
    n_spans = -(-slots // SPAN_SLOTS[job.device])
    span = slots / n_spans
    n_blocks = 3 if job.config.model.attention_dropout else 2  # probabilities, after dropout, and their gradients
    buffers = vector * (rows + 3 * slots) + n_blocks * span * columns * 4  # scaled queries; dq, dk, dv by slot
    grads = vector * 3 * rows
    # q, dO, k and v; with several spans also the next one's q and dO
    sorted_copies = vector * (6 if n_spans > 1 else 4) * span
    keys = vector * rows if layer.n_buckets > 1 else 0  # normalized queries
    in_float32 = 0 if job.layer_shape.element_size == 4 else vector * 3 * rows  # k, v and dO
    return layouts + REUSED_BUFFER_FACTOR * buffers + grads + sorted_copies + keys + in_float32


@dataclass(frozen=True)
class ExchangeMemory:
    """Bucket exchange of one layer on one rank, in its backward."""

    job: JobSpec
    layer: LayerRule
    n_heads: int
    seq_len: int
    """Length of the whole sequence."""

    @property
    def n_local(self) -> int:
        return -(-self.seq_len // self.job.mesh_shape[1])

    @property
    def group_heads(self) -> int:
        return min(self.n_heads, max(1, EXCHANGE_TOKENS[self.job.device] // self.n_local))

    @property
    def copies(self) -> float:
        """Expected number of ranks that hold a token, its own included, if buckets are evenly distributed."""
        n_ranks, rule = self.job.mesh_shape[1], self.layer.rule
        if self.layer.n_buckets > 1:
            return 1 + mean_other_ranks(n_ranks, self.layer.n_rounds)
        if isinstance(rule, ChunkRule):
            reach = rule.chunk_len * (rule.n_before + rule.n_after)
        else:
            reach = (rule.window - 1) * (1 if rule.causal else 2)
        return 1 + min(n_ranks - 1.0, reach / self.n_local)

    def saved_plan(self) -> float:
        """The exchange plan, saved for the recompute: received bucket ids, destination masks and bucket counts."""
        shape = self.job.layer_shape
        tokens = self.n_heads * self.n_local
        counts = self.n_heads * self.layer.n_rounds * self.layer.n_buckets * 4
        n_ids = self.copies * self.layer.n_rounds
        is_counted = self.job.config.model.count_pairs_once and self.layer.n_rounds > 1
        ids = n_ids * (shape.ids / shape.n_hashes + (4 if is_counted else 0))
        return tokens * (ids + 4 * self.job.mesh_shape[1] / 8) + counts

    def workspace(self) -> float:
        """Peak, during the attention of a middle group while its neighbours are in flight."""
        shape, n_separate = self.job.layer_shape, 0 if self.layer.shares_keys else 1
        keys, queries, grads = (n * shape.vector for n in (2, 1 + n_separate, 2 + n_separate))
        queries += 8  # the logsumexp and rowsum(dO * o)
        rows = self.group_heads * self.n_local * self.copies
        n_groups = -(-self.n_heads // self.group_heads)
        # send and receive buffers: both live until the transfer completes
        dispatched, combined = 2 * (keys + queries), 2 * grads
        in_flight = [0, max(dispatched, combined), dispatched + combined][min(n_groups, 3) - 1]
        received = keys + queries
        indices = INDEX_BYTES * (4 + self.layer.n_rounds) + 8
        query_rows = (1 + n_separate) * shape.vector  # dO, and separate q; 0 for rows that are keys only
        return rows * (in_flight + received + indices + query_rows) + self._attention(rows)

    def _attention(self, rows: float) -> float:
        job, layer, shape = self.job, self.layer, self.job.layer_shape
        n_grads, n_buckets = 2 if layer.shares_keys else 3, self.group_heads * layer.n_buckets
        if uses_triton(job):
            grads = rows * n_grads * shape.head_dim * shape.element_size
            return triton_order_bytes(job, layer, rows, n_buckets) + grads + round_gradient_bytes(job, layer, rows)
        if uses_native(job, layer):
            vector = shape.head_dim * 4
            # received rows are contiguous, but not in float32
            copies = 2 if shape.element_size == 4 else n_grads + 1
            return native_order_bytes(layer, rows, n_buckets) + rows * (vector * (copies + n_grads) + 12)
        return torch_backward(job, layer, rows, self.group_heads, self.seq_len)
