"""Working memory of attention beside its inputs and outputs: of tiles, of the C library, of kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reformer_dist.config import AttentionBackend
from reformer_dist.models.layer_rule import LayerRule
from reformer_dist.ops.lsh.backends import why_not
from reformer_dist.ops.lsh.native.attention import GROUP_TOKENS as NATIVE_TOKENS
from reformer_dist.ops.lsh.options import ChunkRule, WindowRule
from reformer_dist.ops.lsh.partition import choose_tiling
from reformer_dist.ops.lsh.torch_tiles.attention import GROUP_TOKENS
from reformer_dist.ops.lsh.torch_tiles.tiles import SPAN_SLOTS
from reformer_dist.ops.lsh.triton_kernels.tuning import GROUP_TOKENS as KERNEL_TOKENS
from reformer_dist.ops.lsh.triton_kernels.tuning import tuning_of
from reformer_dist.parallel.plan import GROUP_TOKENS as EXCHANGE_TOKENS
from reformer_dist.parallel.traffic import mean_other_ranks
from reformer_dist.planning.sizes import JobSpec

INDEX = 8  # bytes of a slot or row number
SCRATCH = 1.1  # buffers that are used again are a tenth larger than what asked for them


def workspace(job: JobSpec, layer: LayerRule, units: int, seq_len: int) -> float:
    """Highest working memory of the backward of so many whole units of a layer."""
    if runs_kernels(job):
        return kernel_backward(job, layer, units, seq_len)
    if runs_native(job, layer):
        return native_backward(job, layer, units, seq_len)
    n_units = min(units, max(1, GROUP_TOKENS[job.device] // seq_len))
    rows = n_units * seq_len
    of_group_before = 0 if n_units == units else 3 * rows * job.layer_shape.head_dim * 4
    return tiled_backward(job, layer, rows, n_units, seq_len) + of_group_before


def runs_kernels(job: JobSpec) -> bool:
    """Whether a GPU would attend by the Triton kernels: `ops.lsh.backends.choose`, without the GPU."""
    asked = job.config.model.attention_backend
    by_name = asked in (AttentionBackend.auto, AttentionBackend.triton)
    head_dim = job.layer_shape.head_dim
    return by_name and job.device == "cuda" and head_dim % 16 == 0 and head_dim <= 128


def runs_native(job: JobSpec, layer: LayerRule) -> bool:
    """Whether this machine would attend by the C library."""
    asked = job.config.model.attention_backend
    by_name = asked in (AttentionBackend.auto, AttentionBackend.native)
    chunks = isinstance(layer.rule, ChunkRule)
    head_dim, device = job.layer_shape.head_dim, torch.device("cpu")
    return by_name and job.device == "cpu" and why_not("native", device, head_dim, chunks=chunks) is None


def native_backward(job: JobSpec, layer: LayerRule, units: int, seq_len: int) -> float:
    """Backward of a group by the C library: its order, numbers of its rows, and copies in float32."""
    n_units = min(units, max(1, NATIVE_TOKENS // seq_len))
    rows, vector, n_buckets = n_units * seq_len, job.layer_shape.head_dim * 4, n_units * layer.n_buckets
    is_counted = job.config.model.count_pairs_once and layer.n_rounds > 1
    order = native_order(layer, rows, n_buckets) + (4 * rows * layer.n_rounds if is_counted else 0)
    sorting = layer.n_rounds * 4 * (rows + n_buckets)
    in_float32 = 0 if job.layer_shape.element_size == 4 else 6 if layer.shares_keys else 8
    attending = vector * rows * in_float32 + 4 * rows * (3 if layer.shares_keys else 1)
    # the order of the group before is there until this one's is made
    return order + max(sorting + (order if n_units < units else 0), attending)


def native_order(layer: LayerRule, rows: float, n_buckets: int) -> float:
    """The places of rows in buckets of all units, and spans of them."""
    return layer.n_rounds * (4 * rows + 16 * n_buckets)


def kernel_backward(job: JobSpec, layer: LayerRule, units: int, seq_len: int) -> float:
    """Backward by the kernels: order and tiles of all units, rowsum(dO o), and a group's gradients by round."""
    rows = units * seq_len
    group = min(units, max(1, KERNEL_TOKENS // (layer.n_rounds * seq_len)))
    order = kernel_tiles(job, layer, rows, units * layer.n_buckets)
    return order + 4 * rows + kernel_parts(job, layer, group * seq_len)


def kernel_tiles(job: JobSpec, layer: LayerRule, rows: float, n_buckets: int) -> float:
    """The places of rows in buckets of all units, and their tiles."""
    shape = job.layer_shape
    block = tuning_of(shape.head_dim, torch.float32 if shape.element_size == 4 else torch.bfloat16).block
    return layer.n_rounds * (4 * rows + 16 * (rows / block + n_buckets))


def kernel_parts(job: JobSpec, layer: LayerRule, rows: float) -> float:
    """Each round's gradients of the rows, which are then added up."""
    n_parts = 0 if layer.n_rounds == 1 else 2 if layer.shares_keys else 3
    return rows * layer.n_rounds * n_parts * job.layer_shape.head_dim * job.layer_shape.element_size


def tiled_backward(job: JobSpec, layer: LayerRule, rows: float, n_units: int, seq_len: int) -> float:
    """Backward of a group of rows, each a vector of head_dim: its layouts, sorted copies, sums and scores."""
    tiling = choose_tiling(layer.rule, seq_len, layer.n_buckets)
    tile_len = tiling.tile_len
    columns = tile_len * (tiling.n_before + 1 + tiling.n_after)
    slots = rows
    if isinstance(layer.rule, WindowRule) and layer.n_buckets > 1:
        slots += n_units * layer.n_buckets * tile_len / 2  # the last tile of a bucket is half empty
    vector = job.layer_shape.head_dim * 4
    layouts = layer.n_rounds * (INDEX * (slots + rows) + 4 * slots * columns / tile_len)
    n_spans = -(-slots // SPAN_SLOTS[job.device])
    span = slots / n_spans
    n_blocks = 3 if job.config.model.attention_dropout else 2  # probabilities, what is left of them, and gradients
    kept = vector * (rows + 3 * slots) + n_blocks * span * columns * 4  # scaled queries; dq, dk, dv by slot
    grads = vector * 3 * rows
    # q, dO, k and v; and the next span's q and dO, while they are still there
    sorted_copies = vector * (6 if n_spans > 1 else 4) * span
    keys = vector * rows if layer.n_buckets > 1 else 0  # made of the queries
    in_float32 = 0 if job.layer_shape.element_size == 4 else vector * 3 * rows  # k, v and dO
    return layouts + SCRATCH * kept + grads + sorted_copies + keys + in_float32


NUMBER = 8  # bytes of a row's unit, position or sort key


@dataclass(frozen=True)
class ExchangeMemory:
    """Of one layer on one rank, in its backward."""

    job: JobSpec
    layer: LayerRule
    units: int
    seq_len: int
    """Of the whole order."""

    @property
    def n_local(self) -> int:
        return -(-self.seq_len // self.job.mesh_shape[1])

    @property
    def units_at_a_time(self) -> int:
        return min(self.units, max(1, EXCHANGE_TOKENS[self.job.device] // self.n_local))

    @property
    def copies(self) -> float:
        """Ranks that hold a token, its own among them, if buckets are spread evenly."""
        n_ranks, rule = self.job.mesh_shape[1], self.layer.rule
        if self.layer.n_buckets > 1:
            return 1 + mean_other_ranks(n_ranks, self.layer.n_rounds)
        if isinstance(rule, ChunkRule):
            reach = rule.chunk_len * (rule.n_before + rule.n_after)
        else:
            reach = (rule.window - 1) * (1 if rule.causal else 2)
        return 1 + min(n_ranks - 1.0, reach / self.n_local)

    def remembered(self) -> float:
        """The plan, which is kept for the recompute: ids that came, who takes which token, and counts."""
        shape = self.job.layer_shape
        tokens = self.units * self.n_local
        counts = self.units * self.layer.n_rounds * self.layer.n_buckets * 4
        n_ids = self.copies * self.layer.n_rounds
        is_counted = self.job.config.model.count_pairs_once and self.layer.n_rounds > 1
        ids = n_ids * (shape.ids / shape.n_hashes + (4 if is_counted else 0))
        return tokens * (ids + 4 * self.job.mesh_shape[1] / 8) + counts

    def workspace(self) -> float:
        """Highest at the attention of a group in the middle."""
        shape, n_own = self.job.layer_shape, 0 if self.layer.shares_keys else 1
        keys, asked, grads = (n * shape.vector for n in (2, 1 + n_own, 2 + n_own))
        asked += 8  # the logsumexp and rowsum(dO * o)
        rows = self.units_at_a_time * self.n_local * self.copies
        n_groups = -(-self.units // self.units_at_a_time)
        going_out, going_home = 2 * (keys + asked), 2 * grads  # what is sent lives until it has arrived
        travelling = [0, max(going_out, going_home), going_out + going_home][min(n_groups, 3) - 1]
        arrived = keys + asked
        numbers = NUMBER * (4 + self.layer.n_rounds) + 8
        as_queries = (1 + n_own) * shape.vector  # dO, and q that came apart: 0 for rows that are no queries
        return rows * (travelling + arrived + numbers + as_queries) + self._attention(rows)

    def _attention(self, rows: float) -> float:
        job, layer, shape = self.job, self.layer, self.job.layer_shape
        n_grads, n_buckets = 2 if layer.shares_keys else 3, self.units_at_a_time * layer.n_buckets
        if runs_kernels(job):
            grads = rows * n_grads * shape.head_dim * shape.element_size
            return kernel_tiles(job, layer, rows, n_buckets) + grads + kernel_parts(job, layer, rows)
        if runs_native(job, layer):
            wide = shape.head_dim * 4
            # what came apart from others already lies side by side, but not in float32
            copies = 2 if shape.element_size == 4 else n_grads + 1
            return native_order(layer, rows, n_buckets) + rows * (wide * (copies + n_grads) + 12)
        return tiled_backward(job, layer, rows, self.units_at_a_time, self.seq_len)
