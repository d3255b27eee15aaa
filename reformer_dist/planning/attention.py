"""Working memory of attention beside its inputs and outputs: of tiles, of kernels, of exchange between ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reformer_dist.config import AttentionImplementation, AttentionKind, ModelConfig, NeighbourRule
from reformer_dist.ops.lsh.attention import GROUP_TOKENS
from reformer_dist.ops.lsh.implementation import why_not
from reformer_dist.ops.lsh.kernels.tuning import GROUP_TOKENS as KERNEL_TOKENS
from reformer_dist.ops.lsh.kernels.tuning import tuning_of
from reformer_dist.ops.lsh.native.attention import GROUP_TOKENS as NATIVE_TOKENS
from reformer_dist.ops.lsh.rules import ChunkRule, Rule, WindowRule
from reformer_dist.ops.lsh.runs import tiling_of
from reformer_dist.ops.lsh.tiles import SPAN_SLOTS
from reformer_dist.parallel.plan import GROUP_TOKENS as ROUTE_TOKENS
from reformer_dist.parallel.traffic import mean_other_ranks
from reformer_dist.planning.sizes import Job, Sizes

INDEX = 8  # bytes of a slot or row number
SCRATCH = 1.1  # buffers that are used again are a tenth larger than what asked for them


@dataclass(frozen=True)
class LayerRule:
    """What decides an attention layer's layout."""

    rule: Rule
    n_rounds: int
    n_buckets: int

    @staticmethod
    def of(model: ModelConfig, kind: AttentionKind) -> LayerRule:
        if kind is AttentionKind.local and not model.local_chunk_len:
            return LayerRule(WindowRule(model.local_window, model.causal, sees_self=True), 1, 1)
        if kind is AttentionKind.local:
            before, after = model.local_chunks_before, model.local_chunks_after
            chunks = ChunkRule(
                model.local_chunk_len, model.causal, before, after, model.chunk_wrap, sees_self=True
            )
            return LayerRule(chunks, 1, 1)
        rule: Rule = WindowRule(model.window, model.causal)
        if model.neighbours is NeighbourRule.chunk:
            before, after = model.n_chunks_before, model.n_chunks_after
            rule = ChunkRule(model.chunk_len, model.causal, before, after, model.chunk_wrap)
        return LayerRule(rule, model.n_hashes + model.local_round, model.n_buckets)


def workspace(job: Job, kind: AttentionKind) -> float:
    """Highest working memory of an attention layer's backward on one rank, exchange included."""
    if kind is AttentionKind.exact:
        return 0.0
    shape, (heads, buckets) = job.layer_shape, job.grid
    layer = LayerRule.of(job.config.model, kind)
    units = shape.rows * shape.n_heads // heads
    seq_len = min(shape.slice_len * heads, job.config.data.seq_len)
    if buckets > 1:
        return exchange_buffers(job, layer, units, seq_len, buckets)
    if runs_kernels(job):
        return kernel_backward(job, layer, units, seq_len, shared=kind is AttentionKind.lsh)
    if runs_native(job, layer):
        return native_backward(job, layer, units, seq_len, shared=kind is AttentionKind.lsh)
    n_units = min(units, max(1, GROUP_TOKENS[job.device] // seq_len))
    rows = n_units * seq_len
    is_last = n_units == units
    return tiled_backward(job, layer, rows, n_units, seq_len) + (0 if is_last else 3 * rows * shape.head_dim * 4)


def runs_kernels(job: Job) -> bool:
    """Whether a GPU would attend by the Triton kernels: `ops.lsh.implementation.choose`, without the GPU."""
    asked = job.config.model.attention_implementation
    by_name = asked in (AttentionImplementation.auto, AttentionImplementation.triton)
    head_dim = job.layer_shape.head_dim
    return by_name and job.device == "cuda" and head_dim % 16 == 0 and head_dim <= 128


def runs_native(job: Job, layer: LayerRule) -> bool:
    """Whether this machine would attend by the C library."""
    asked = job.config.model.attention_implementation
    by_name = asked in (AttentionImplementation.auto, AttentionImplementation.native)
    chunks = isinstance(layer.rule, ChunkRule)
    head_dim, device = job.layer_shape.head_dim, torch.device("cpu")
    return by_name and job.device == "cpu" and why_not("native", device, head_dim, chunks=chunks) is None


def native_backward(job: Job, layer: LayerRule, units: int, seq_len: int, *, shared: bool) -> float:
    """Backward of a group by the C library: its order, numbers of its rows, and copies in float32."""
    n_units = min(units, max(1, NATIVE_TOKENS // seq_len))
    rows, vector = n_units * seq_len, job.layer_shape.head_dim * 4
    is_counted = job.config.model.count_pairs_once and layer.n_rounds > 1
    order = layer.n_rounds * (4 * rows * (2 if is_counted else 1) + 16 * n_units * (layer.n_buckets + 1))
    sorting = layer.n_rounds * 4 * (rows + n_units * (layer.n_buckets + 2))
    in_float32 = 0 if job.layer_shape.element_size == 4 else 6 if shared else 8
    attending = vector * rows * in_float32 + 4 * rows * (3 if shared else 1)
    # the order of the group before is there until this one's is made
    return order + max(sorting + (order if n_units < units else 0), attending)


def kernel_backward(job: Job, layer: LayerRule, units: int, seq_len: int, *, shared: bool) -> float:
    """Backward by the kernels: order and tiles of all units, rowsum(dO o), and a group's gradients by round."""
    shape, n_rounds = job.layer_shape, layer.n_rounds
    block = tuning_of(shape.head_dim, torch.float32 if shape.element_size == 4 else torch.bfloat16).block
    n_tiles = seq_len / block + layer.n_buckets
    order = units * n_rounds * (4 * seq_len + 16 * n_tiles)
    group = min(units, max(1, KERNEL_TOKENS // (n_rounds * seq_len)))
    n_parts = 0 if n_rounds == 1 else 2 if shared else 3
    parts = group * n_rounds * seq_len * shape.head_dim * shape.element_size * n_parts
    return order + 4 * units * seq_len + parts


def tiled_backward(job: Job, layer: LayerRule, rows: float, n_units: int, seq_len: int) -> float:
    """Backward of a group of rows, each a vector of head_dim: its layouts, sorted copies, sums and scores."""
    tiling = tiling_of(layer.rule, seq_len, layer.n_buckets)
    tile_len = tiling.tile_len
    columns = tile_len * (tiling.back + 1 + tiling.front)
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


def exchange_buffers(job: Job, layer: LayerRule, units: int, seq_len: int, buckets: int) -> float:
    """Bucket exchange: the plan, a route that is attended, and its neighbours that travel."""
    shape, sizes = job.layer_shape, Sizes.of(job)
    n_local = -(-seq_len // buckets)
    per_route = min(units, max(1, ROUTE_TOKENS[job.device] // n_local))
    n_routes = -(-units // per_route)
    own = per_route * n_local
    copies = 1 + mean_other_ranks(buckets, layer.n_rounds)
    rows = own * copies
    key, asked = 2 * shape.vector, shape.vector + 8
    in_flight = min(n_routes, 2) * 2 * rows * (key + asked)
    at_home = rows * (key + shape.head_dim * 4 * 2)
    plan = units * n_local * (copies * layer.n_rounds * 2 + buckets / 2)
    attended = tiled_backward(job, layer, rows, per_route, seq_len)
    guests = rows * shape.head_dim * 4 * 3
    return plan + in_flight + at_home + attended + guests + sizes.per_head
