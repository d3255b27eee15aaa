"""Arithmetic of one step over all ranks: products of matrices and attention; an addition counts too."""

from __future__ import annotations

from reformer_dist.config import Activation, AttentionKind, ModelConfig, NeighbourRule, Recompute
from reformer_dist.ops.lsh.hashing import LARGEST_FACTOR, bucket_factors
from reformer_dist.planning.sizes import Job, n_projections


def step_flops(job: Job) -> float:
    """Of forward, backward (twice as much) and recompute."""
    model, data = job.config.model, job.config.data
    tokens = data.batch_size * data.seq_len
    layers = sum(layer_flops(model, kind, data.seq_len) for kind in model.layer_kinds())
    passes = 3 if model.recompute is Recompute.none else 4
    head = 2 * model.table_width * job.vocab_size
    if model.embedding_dim is not None:
        head += 2 * model.embedding_dim * (model.dim + model.output_dim)
    return tokens * (layers * passes * (1 - model.layer_drop) + head * 3)


def layer_flops(model: ModelConfig, kind: AttentionKind, seq_len: int) -> float:
    """Of one token's forward through a layer."""
    inner, heads = model.resolved_ff_dim, model.n_heads * model.resolved_head_dim
    wide = 3 if model.activation is Activation.glu else 2
    values = model.resolved_head_dim if model.one_value_head else heads
    products = 2 * model.dim * (heads * n_projections(kind) + values + inner * wide)
    return products + attention_flops(model, kind, seq_len)


def attention_flops(model: ModelConfig, kind: AttentionKind, seq_len: int) -> float:
    """Of one token's hashing and attention: scores and weighted values of every pair that may meet."""
    heads = model.n_heads * model.resolved_head_dim
    if kind is AttentionKind.exact:
        return 4 * heads * seq_len / 2
    if kind is AttentionKind.local:
        chunks = model.local_chunk_len * (1 + model.local_chunks_before + model.local_chunks_after)
        return 4 * heads * (chunks or model.local_window)
    rounds = model.n_hashes + model.local_round
    seen = model.window
    if model.neighbours is NeighbourRule.chunk:
        seen = model.chunk_len * (1 + model.n_chunks_before + model.n_chunks_after)
    scheme = model.hash_scheme.name
    factors = model.bucket_factors or bucket_factors(model.n_buckets, LARGEST_FACTOR[scheme])
    columns = sum(factors) // 2 if scheme == "rotation" else len(factors)
    return heads * (4 * seen * rounds + 2 * columns * model.n_hashes)
