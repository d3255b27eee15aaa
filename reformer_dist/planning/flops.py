"""FLOPs of one step over all ranks: matrix products and attention. A multiply-add counts as two."""

from __future__ import annotations

from reformer_dist.config import (
    AttentionKind,
    CrossAttentionKind,
    ModelConfig,
    NeighbourRule,
    Recompute,
    TaskKind,
)
from reformer_dist.ops.lsh.hashing import LARGEST_FACTOR, bucket_factors
from reformer_dist.planning.sizes import JobSpec, n_convolutions, n_projections


def step_flops(job: JobSpec) -> float:
    """Forward, backward (twice the forward) and recompute."""
    return _step_flops(job, n_recomputes=0 if job.config.model.recompute is Recompute.none else 1)


def model_flops(job: JobSpec) -> float:
    """Forward and backward only: what the model needs, however its activations are obtained."""
    return _step_flops(job, n_recomputes=0)


def _step_flops(job: JobSpec, n_recomputes: int) -> float:
    model, rows = job.config.model, job.config.data.batch_size
    layers = _stack_flops(job)
    if job.encoder:
        layers += _stack_flops(job.encoder) + model.n_layers * cross_flops(job, job.encoder)
    return rows * (layers * (3 + n_recomputes) * (1 - model.layer_drop) + _ends_flops(job) * 3)


def _stack_flops(job: JobSpec) -> float:
    """Forward of one row through the layers of a stack, without cross attention."""
    model, seq_len = job.config.model, job.config.data.seq_len
    return seq_len * sum(layer_flops(model, kind, seq_len) for kind in model.layer_kinds())


def cross_flops(job: JobSpec, encoder: JobSpec) -> float:
    """Forward of one row through the cross attention of one layer."""
    model, target, source = job.config.model, job.config.data.seq_len, encoder.config.data.seq_len
    heads = model.n_heads * model.resolved_head_dim
    products = 2 * model.dim * heads * 2 * (target + source)  # q and the output; k and v
    if model.cross_attention is CrossAttentionKind.exact:
        return products + 4 * heads * target * source
    pairs = target * source * model.n_hashes / model.n_buckets
    return products + 4 * heads * pairs + hash_flops(model) * (target + source)


def _ends_flops(job: JobSpec) -> float:
    """Forward of one row through embedding and head."""
    model, seq_len, kind = job.config.model, job.config.data.seq_len, job.config.task.kind
    projection = 2 * model.embedding_dim * model.dim if model.embedding_dim is not None else 0
    n_embedded = seq_len + (job.encoder.config.data.seq_len if job.encoder else 0)
    if kind is TaskKind.sequence_classification:
        return projection * n_embedded + 2 * model.output_dim * model.dim
    head = 2 * model.table_width * job.vocab_size
    if kind is TaskKind.question_answering:
        head = 2 * model.output_dim * 2
    elif model.embedding_dim is not None:
        head += 2 * model.embedding_dim * model.output_dim
    return projection * n_embedded + head * seq_len


def layer_flops(model: ModelConfig, kind: AttentionKind, seq_len: int) -> float:
    """Forward of one token through a layer."""
    inner, heads = model.resolved_ff_dim, model.n_heads * model.resolved_head_dim
    n_matrices = 3 if model.activation.is_gated else 2
    values = model.resolved_head_dim if model.one_value_head else heads
    products = 2 * model.dim * (heads * n_projections(model, kind) + values + inner * n_matrices)
    convolutions = 2 * model.qk_conv * heads * n_convolutions(model, kind)
    return products + convolutions + attention_flops(model, kind, seq_len)


def attention_flops(model: ModelConfig, kind: AttentionKind, seq_len: int) -> float:
    """Hashing and attention of one token: scores and weighted values of all visible pairs."""
    heads = model.n_heads * model.resolved_head_dim
    if kind is AttentionKind.exact:
        return 4 * heads * seq_len / 2
    if kind is AttentionKind.local:
        chunks = model.compat.local_chunk_len * (
            1 + model.compat.local_chunks_before + model.compat.local_chunks_after
        )
        return 4 * heads * (chunks or model.local_window)
    rounds = model.n_hashes + model.local_round
    n_keys = model.window
    if model.neighbours is NeighbourRule.chunk:
        n_keys = model.chunk_len * (1 + model.n_chunks_before + model.n_chunks_after)
    return heads * 4 * n_keys * rounds + hash_flops(model)


def hash_flops(model: ModelConfig) -> float:
    """Bucket ids of one token."""
    scheme = model.hash_scheme.name
    factors = model.compat.bucket_factors or bucket_factors(model.n_buckets, LARGEST_FACTOR[scheme])
    columns = sum(factors) // 2 if scheme == "rotation" else len(factors)
    n_hashed = 1 if model.shared_qk else 2
    return model.n_heads * model.resolved_head_dim * 2 * columns * model.n_hashes * n_hashed
