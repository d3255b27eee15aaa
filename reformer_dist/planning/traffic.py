"""Bytes that a rank sends in one step: ZeRO's collectives and sequence parallelism.

In an all-reduce of n bytes over w ranks each sends 2 n (w - 1) / w, in a reduce-scatter or all-gather half of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from reformer_dist.config import AttentionKind, CrossAttentionKind, Recompute
from reformer_dist.engine.groups import Update
from reformer_dist.parallel.traffic import bucket_bytes, head_bytes, mean_other_ranks
from reformer_dist.planning.sizes import JobSpec, n_projections
from reformer_dist.planning.states import GRADIENT_BYTES, STAGE3_LIVE_PARAMETERS, ParameterCount

Traffic = dict[str, float]
GRADIENTS, WEIGHTS, HEADS, BUCKETS = "gradients", "weights", "exchange of heads", "exchange of buckets"
MATRICES = "matrices of Muon"


def zero_traffic(job: JobSpec, count: ParameterCount) -> Traffic:
    """Traffic of ZeRO for gradients and weights."""
    world, stage = job.world_size, job.config.deepspeed.stage
    others = (world - 1) / world
    grads, weights = GRADIENT_BYTES * count.trained * others, job.weight_bytes * count.trained * others
    if stage == 0:
        return {GRADIENTS: 2 * grads}
    if stage < 3:
        # stage 2 does not keep the gradients of other ranks' partitions, so it reduces after every micro-batch
        return {GRADIENTS: 2 * grads * (job.n_micro if stage == 2 else 1), WEIGHTS: weights}
    # in forward, and again in backward unless the gathered weights are still in memory
    n_gathers = 1 if count.total <= STAGE3_LIVE_PARAMETERS else 2
    gathered = n_gathers * job.weight_bytes * count.total * others * job.n_micro
    return {GRADIENTS: grads * job.n_micro, WEIGHTS: gathered} | _muon_traffic(count, world)


def _muon_traffic(count: ParameterCount, world: int) -> Traffic:
    """At stage 3, float32 parts of each matrix go to a rank and back. (At 1 and 2, few matrices are split.)"""
    elements = sum(sum(group.sizes) for group in count.groups if group.update is Update.muon)
    return {MATRICES: 2 * 4.0 * elements * (world - 1) / world**2} if elements else {}


def exchange_traffic(job: JobSpec) -> Traffic:
    """Traffic of sequence parallelism; empty without it."""
    parts = {HEADS: 0.0, BUCKETS: 0.0}
    for stack in [job, job.encoder] if job.encoder else [job]:
        for kind in stack.config.model.layer_kinds():
            layer = LayerTraffic(stack, kind)
            parts[HEADS] += layer.heads() * job.n_micro
            parts[BUCKETS] += layer.buckets() * job.n_micro
    if job.encoder:
        parts[HEADS] += cross_attention_bytes(job, job.encoder) * job.config.model.n_layers * job.n_micro
    return {name: amount for name, amount in parts.items() if amount}


def forwards(job: JobSpec) -> int:
    """Forward passes of a layer per step. A recompute sends q, k, v and o again, but no ids, masks or counts."""
    return 1 if job.config.model.recompute is Recompute.none else 2


def cross_attention_bytes(job: JobSpec, encoder: JobSpec) -> float:
    """Traffic of one layer and micro-batch: q and o of the targets, k and v of the sources, and their gradients.

    A recompute sends the bucket ids again, since each rank saves only those of its slice.
    """
    n_ranks, targets, sources = job.config.parallel.sequence, job.layer_shape, encoder.layer_shape
    vectors = 2 * (targets.tokens + sources.tokens) * targets.vector
    ids = 0
    if job.config.model.cross_attention is CrossAttentionKind.lsh:
        # without the local round, which only self-attention has
        ids = (targets.tokens + sources.tokens) * replace(
            targets, n_hashes=job.config.model.n_hashes, own_keys=False
        ).ids
    return (vectors * (forwards(job) + 1) + ids * forwards(job)) * (n_ranks - 1) / n_ranks


@dataclass(frozen=True)
class LayerTraffic:
    """Traffic of one layer and micro-batch in forward, recompute and backward."""

    job: JobSpec
    kind: AttentionKind

    @property
    def _forwards(self) -> int:
        return forwards(self.job)

    def heads(self) -> float:
        shape = self.job.layer_shape
        heads = self.job.config.parallel.sequence if self.kind is AttentionKind.exact else self.job.mesh_shape[0]
        vectors = shape.tokens * shape.vector * (heads - 1) / heads
        n_vectors = n_projections(self.job.config.model, self.kind) + 1  # q, k, v and o; or their gradients
        ids = head_bytes(shape, heads) - n_vectors * vectors if self.kind is AttentionKind.lsh else 0.0
        return vectors * n_vectors * (self._forwards + 1) + ids

    def buckets(self) -> float:
        shape, (heads, buckets) = self.job.layer_shape, self.job.mesh_shape
        if buckets == 1 or self.kind is AttentionKind.exact:
            return 0.0
        if self.kind is AttentionKind.local:
            # keys and values of the neighbouring slices within the window, and their gradients
            model = self.job.config.model
            chunks = model.compat.local_chunk_len * (
                1 + model.compat.local_chunks_before + model.compat.local_chunks_after
            )
            window, slice_len = chunks or model.local_window, shape.slice_len * heads
            reach = min(buckets - 1.0, (window - 1) / slice_len) * (buckets - 1) / buckets
            return reach * shape.tokens * 2 * shape.vector * (self._forwards + 2)
        sent = mean_other_ranks(buckets, shape.n_hashes)
        queries = shape.vector if shape.own_keys else 0  # q, and dq in the backward
        recompute = sent * shape.tokens * (2 * shape.vector + queries + shape.vector + 4)
        backward = sent * shape.tokens * (2 * shape.vector + shape.vector + 8 + 2 * shape.vector + 2 * queries)
        return bucket_bytes(shape, heads, buckets) + recompute * (self._forwards - 1) + backward
