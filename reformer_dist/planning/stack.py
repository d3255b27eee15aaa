"""Memory of one stack of layers: activations stored by the lower layers, and the backward of one layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reformer_dist.config import AttentionKind, Recompute
from reformer_dist.models.layer_rule import LayerRule
from reformer_dist.ops.lsh.attention import WorkspaceShape
from reformer_dist.ops.lsh.backends import choose_for_planning, workspace_bytes
from reformer_dist.ops.lsh.neighbour_rules import ChunkRule
from reformer_dist.parallel.traffic import ExchangeMemory
from reformer_dist.planning.activations import SublayerMemory
from reformer_dist.planning.cross_attention import CrossAttentionMemory
from reformer_dist.planning.sizes import JobSpec, Sizes
from reformer_dist.planning.states import BlockCount, MemoryBreakdown

STREAMS, STORED, LAYER = "residual streams", "stored activations", "one layer's backward"
WORKSPACE = "attention workspace"
FEED_FORWARD, CROSS, ATTENTION = "feed-forward", "cross attention", "attention"


@dataclass(frozen=True)
class StackMemory:
    """The layers of one micro-batch on one rank."""

    job: JobSpec
    blocks: list[BlockCount]

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.job)

    @property
    def n_layers(self) -> int:
        return self.job.config.model.n_layers

    def unshared_parameters(self, layer: int) -> int:
        """Parameters of a layer that no lower layer shares."""
        return self.blocks[layer].total if layer < len(self.blocks) else 0

    def backward_order(self, layer: int) -> list[tuple[str, int]]:
        """Sublayers in the order of backward, each with the layer's parameters that have gradients by then."""
        block = self.blocks[layer % len(self.blocks)]
        if self._cross is None:
            return [(FEED_FORWARD, 0), (ATTENTION, block.feed_forward)]
        after_cross = block.feed_forward + block.cross_attention
        return [(FEED_FORWARD, 0), (CROSS, block.feed_forward), (ATTENTION, after_cross)]

    def stored(self, n_layers: int) -> float:
        """Activations that the lowest `n_layers` layers store for backward."""
        recompute, stream = self._recompute, self.sizes.stream
        if recompute is Recompute.reversible:
            return self._sum_over(n_layers, self._saved_for_recompute)
        if recompute is Recompute.checkpoint:
            return self._sum_over(n_layers, lambda layer: 2 * stream + self._saved_for_recompute(layer))
        # each norm saves its input stream
        n_norms = 2 if self._cross is None else 3
        return self._sum_over(n_layers, lambda layer: n_norms * stream + self._saved(layer))

    def _sum_over(self, n_layers: int, bytes_of: Callable[[int], float]) -> float:
        """The sum over the lowest layers, of which those with the same place in the pattern need the same."""
        period = len(self.job.config.model.layers)
        return sum(len(range(i, n_layers, period)) * bytes_of(i) for i in range(min(period, n_layers)))

    def backward(self, layer: int, sublayer: str) -> MemoryBreakdown:
        """Memory during the backward of a sublayer."""
        sizes, sublayers = self.sizes, self._sublayers
        parts: MemoryBreakdown = {WORKSPACE: self._workspace(layer, sublayer)}
        if self._recompute is Recompute.reversible:
            is_chunked = sublayer == FEED_FORWARD
            saved = sublayers.feed_forward_recompute() if is_chunked else self._saved_of(layer, sublayer)
            # gradients of both outputs, the outputs, the reconstructed input and the output of the other half
            streams = 4.0 * sizes.stream if is_chunked else 7.0 * sizes.stream + sizes.hidden
            stored = self.stored(layer)
            layer_bytes = saved + self._backward_extra(layer, sublayer) + sublayers.result
        else:
            names = [name for name, _ in self.backward_order(layer)]
            remaining = names[names.index(sublayer) :]
            layer_bytes = sum(self._saved_of(layer, name) for name in remaining) + self._backward_extra(
                layer, sublayer
            )
            streams = 3.0 * sizes.stream
            stored = self.stored(layer) + 2 * sizes.stream
        return parts | {STREAMS: streams, STORED: stored, LAYER: float(layer_bytes)}

    @property
    def _recompute(self) -> Recompute:
        return self.job.config.model.recompute

    @property
    def _sublayers(self) -> SublayerMemory:
        return SublayerMemory(self.job, self.sizes)

    @property
    def _cross(self) -> CrossAttentionMemory | None:
        return None if self.job.encoder is None else CrossAttentionMemory(self.job, self.job.encoder)

    def _kind(self, layer: int) -> AttentionKind:
        layers = self.job.config.model.layers
        return layers[layer % len(layers)]

    def _saved_for_recompute(self, layer: int) -> float:
        """Bucket ids and the exchange plan, saved for the recompute."""
        kind = self._kind(layer)
        ids = self.sizes.layer_ids if kind is AttentionKind.lsh else 0
        return ids + self._exchange_plan(kind) + (self._cross.ids if self._cross else 0)

    def _exchange_plan(self, kind: AttentionKind) -> float:
        is_exchanged = kind is not AttentionKind.exact and self.job.mesh_shape[1] > 1
        return self._exchange(kind).plan_bytes() if is_exchanged else 0.0

    def _attention_workspace(self, kind: AttentionKind) -> float:
        if kind is AttentionKind.exact:
            return 0.0
        exchange, model = self._exchange(kind), self.job.config.model
        shape_of_call = exchange.attention
        backend = choose_for_planning(
            model.attention_backend.name,
            self.job.device,
            shape_of_call.head_dim,
            chunks=isinstance(shape_of_call.rule, ChunkRule),
        )
        shifted_values = 0.0
        if kind is AttentionKind.lsh and model.next_value_heads:
            shape = self.job.layer_shape
            shifted_values = shape.rows * shape.n_heads * shape.slice_len * shape.head_dim * shape.element_size
        if self.job.mesh_shape[1] > 1:
            return shifted_values + exchange.workspace_bytes(backend)
        return shifted_values + workspace_bytes(backend, exchange.attention)

    def _exchange(self, kind: AttentionKind) -> ExchangeMemory:
        """Bucket exchange of the heads that this rank has after the head exchange."""
        shape, (heads, buckets), model = self.job.layer_shape, self.job.mesh_shape, self.job.config.model
        layer = LayerRule.of(model, kind)
        attention = WorkspaceShape(
            n_heads=shape.rows * shape.n_heads // heads,
            seq_len=min(shape.slice_len * heads * buckets, self.job.config.data.seq_len),
            n_rounds=layer.n_rounds,
            n_buckets=layer.n_buckets,
            head_dim=shape.head_dim,
            element_size=shape.element_size,
            rule=layer.rule,
            shared_keys=layer.shares_keys,
            count_pairs_once=model.count_pairs_once,
            dropout=model.attention_dropout > 0,
            device=self.job.device,
            own_keys=layer.own_buckets,
            documents=self.job.config.data.keeps_documents_apart,
        )
        return ExchangeMemory(shape, attention, buckets)

    def _saved(self, layer: int) -> float:
        return sum(self._saved_of(layer, name) for name, _ in self.backward_order(layer))

    def _saved_of(self, layer: int, sublayer: str) -> float:
        if sublayer == FEED_FORWARD:
            return self._sublayers.feed_forward_saved()
        if sublayer == ATTENTION:
            kind = self._kind(layer)
            return self._sublayers.attention_saved(kind) + self._exchange_plan(kind)
        assert self._cross is not None
        return self._cross.saved()

    def _backward_extra(self, layer: int, sublayer: str) -> int:
        if sublayer == FEED_FORWARD:
            return self._sublayers.feed_forward_backward()
        if sublayer == ATTENTION:
            return self._sublayers.attention_backward(self._kind(layer))
        assert self._cross is not None
        return self._cross.backward()

    def _workspace(self, layer: int, sublayer: str) -> float:
        if sublayer == FEED_FORWARD:
            return 0.0
        if sublayer == ATTENTION:
            return self._attention_workspace(self._kind(layer))
        assert self._cross is not None
        return self._cross.workspace()
