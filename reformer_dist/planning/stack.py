"""Memory of one stack of layers: what its lower layers keep, and what one that goes back takes."""

from __future__ import annotations

from dataclasses import dataclass

from reformer_dist.config import AttentionKind, Recompute
from reformer_dist.models.layer_rule import LayerRule
from reformer_dist.planning.activations import SublayerMemory
from reformer_dist.planning.attention import ExchangeMemory, workspace
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

    def new_weights(self, layer: int) -> int:
        """Weights of a layer that no layer below it has, too."""
        return self.blocks[layer].total if layer < len(self.blocks) else 0

    def going_back(self, layer: int) -> list[tuple[str, int]]:
        """SublayerMemory as backward meets them, and how many weights of the layer have gradients by then."""
        block = self.blocks[layer % len(self.blocks)]
        if self._cross is None:
            return [(FEED_FORWARD, 0), (ATTENTION, block.feed_forward)]
        after_cross = block.feed_forward + block.cross_attention
        return [(FEED_FORWARD, 0), (CROSS, block.feed_forward), (ATTENTION, after_cross)]

    def stored(self, n_layers: int) -> float:
        """What the lowest n layers keep for backward."""
        recompute, stream = self._recompute, self.sizes.stream
        if recompute is Recompute.reversible:
            return sum(self._remembered(layer) for layer in range(n_layers))
        if recompute is Recompute.checkpoint:
            return sum(2 * stream + self._remembered(layer) for layer in range(n_layers))
        # each norm keeps the stream that it reads
        n_norms = 2 if self._cross is None else 3
        return sum(n_norms * stream + self._saved(layer) for layer in range(n_layers))

    def backward(self, layer: int, sublayer: str) -> MemoryBreakdown:
        """While a sublayer of a layer goes back."""
        sizes, lower = self.sizes, self._sublayers
        parts: MemoryBreakdown = {WORKSPACE: self._workspace(layer, sublayer)}
        if self._recompute is Recompute.reversible:
            is_parted = sublayer == FEED_FORWARD
            saved = lower.feed_forward_rerun() if is_parted else self._saved_of(layer, sublayer)
            # gradients of both outputs, the outputs, and then the rebuilt input and what the other half gave
            streams = 4.0 * sizes.stream if is_parted else 7.0 * sizes.stream + sizes.hidden
            stored = self.stored(layer)
            layer_bytes = saved + self._on_top(layer, sublayer) + lower.result
        else:
            names = [name for name, _ in self.going_back(layer)]
            still_there = names[names.index(sublayer) :]
            layer_bytes = sum(self._saved_of(layer, name) for name in still_there) + self._on_top(layer, sublayer)
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
        return self.job.config.model.layer_kinds()[layer]

    def _remembered(self, layer: int) -> float:
        """Bucket ids, and the plan of an exchange, which a recompute must find again."""
        kind = self._kind(layer)
        own = self.sizes.ids if kind is AttentionKind.lsh else 0
        return own + self._exchange_plan(kind) + (self._cross.ids if self._cross else 0)

    def _exchange_plan(self, kind: AttentionKind) -> float:
        is_exchanged = kind is not AttentionKind.exact and self.job.mesh_shape[1] > 1
        return self._exchange(kind).remembered() if is_exchanged else 0.0

    def _attention_workspace(self, kind: AttentionKind) -> float:
        if kind is AttentionKind.exact:
            return 0.0
        exchange = self._exchange(kind)
        if self.job.mesh_shape[1] > 1:
            return exchange.workspace()
        return workspace(self.job, exchange.layer, exchange.units, exchange.seq_len)

    def _exchange(self, kind: AttentionKind) -> ExchangeMemory:
        """Of the whole units that a layer's attention sees here, once heads have been exchanged."""
        shape, (heads, buckets) = self.job.layer_shape, self.job.mesh_shape
        seq_len = min(shape.slice_len * heads * buckets, self.job.config.data.seq_len)
        layer = LayerRule.of(self.job.config.model, kind)
        return ExchangeMemory(self.job, layer, shape.rows * shape.n_heads // heads, seq_len)

    def _saved(self, layer: int) -> float:
        return sum(self._saved_of(layer, name) for name, _ in self.going_back(layer))

    def _saved_of(self, layer: int, sublayer: str) -> float:
        if sublayer == FEED_FORWARD:
            return self._sublayers.feed_forward_saved()
        if sublayer == ATTENTION:
            kind = self._kind(layer)
            return self._sublayers.attention_saved(kind) + self._exchange_plan(kind)
        assert self._cross is not None
        return self._cross.saved()

    def _on_top(self, layer: int, sublayer: str) -> int:
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
