"""The highest memory of a step on one rank: moments of the step are computed, and the fullest is the peak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from reformer_dist.config import AttentionKind, Recompute
from reformer_dist.planning.activations import Sublayers
from reformer_dist.planning.attention import workspace
from reformer_dist.planning.parameters import BlockCount, ParameterCount
from reformer_dist.planning.sizes import Job, Sizes
from reformer_dist.planning.states import BUFFERS, GRADIENTS, OPTIMIZER, SAVED, WEIGHTS, Parts, States

STREAMS, STORED, LAYER = "residual streams", "stored activations", "one layer's backward"
WORKSPACE, LOSS = "attention workspace", "loss"
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, BUFFERS, SAVED, STREAMS, STORED, LAYER, WORKSPACE, LOSS)


@dataclass(frozen=True)
class Moment:
    """A moment of a step, and the bytes of each part then."""

    name: str
    parts: Parts

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a rank's tensors in the course of a step."""

    job: Job
    count: ParameterCount

    def peak(self) -> Moment:
        """The fullest moment of a step (from the second on, when optimizer states exist)."""
        return max(self.moments(), key=lambda moment: moment.total)

    def moments(self) -> Iterator[Moment]:
        states = States(self.job, self.count)
        held = states.held()

        def moment(name: str, *parts: Parts) -> Moment:
            total: Counter[str] = Counter()
            for some in (held, *parts):
                total.update(some)
            return Moment(name, {part: float(total[part]) for part in PARTS if total[part]})

        if states.stage == 3:
            yield moment("weights are gathered", states.gathering(), {STREAMS: 2.0 * self.sizes.stream})
        yield moment("loss", self._loss(), states.during_backward(0, 0))
        done = self.count.above
        for layer in reversed(range(self.job.config.model.n_layers)):
            block = self._block(layer)
            for sublayer, fresh in (("feed-forward", 0), ("attention", block.feed_forward)):
                name = f"backward of layer {layer}, {sublayer}"
                yield moment(name, self._backward(layer, sublayer), states.during_backward(done, fresh))
            done += block.total if layer < len(self.count.blocks) else 0
        yield moment("gradients are reduced", states.during_reduction())
        yield moment("weights move", states.during_step())

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.job)

    @property
    def _sublayers(self) -> Sublayers:
        return Sublayers(self.job, self.sizes)

    def _block(self, layer: int) -> BlockCount:
        return self.count.blocks[layer % len(self.count.blocks)]

    def _loss(self) -> Parts:
        """While the last logits are at hand: the last layers' outputs, their mean, and both gradients."""
        sizes, model = self.sizes, self.job.config.model
        chunk = min(model.loss_chunk, sizes.tokens) * self.job.vocab_size * 4
        d_weight = self.job.vocab_size * model.table_width * 4
        stored = self._stored(model.n_layers)
        return {
            STREAMS: 3.0 * sizes.stream,
            LOSS: float(sizes.hidden + sizes.stream + d_weight + 3 * chunk),
            STORED: float(stored),
        }

    def _stored(self, n_layers: int) -> int:
        """What the lowest n layers keep for backward."""
        recompute, sizes = self.job.config.model.recompute, self.sizes
        if recompute is Recompute.reversible:
            return sum(self._remembered(layer) for layer in range(n_layers))
        if recompute is Recompute.checkpoint:
            return sum(2 * sizes.stream + self._remembered(layer) for layer in range(n_layers))
        return sum(2 * sizes.stream + self._saved(layer) for layer in range(n_layers))

    def _remembered(self, layer: int) -> int:
        """Bucket ids, which a recompute must find again."""
        return self.sizes.ids if self._kind(layer) is AttentionKind.lsh else 0

    def _kind(self, layer: int) -> AttentionKind:
        return self.job.config.model.layer_kinds()[layer]

    def _saved(self, layer: int) -> int:
        return self._sublayers.attention_saved(self._kind(layer)) + self._sublayers.feed_forward_saved()

    def _backward(self, layer: int, sublayer: str) -> Parts:
        """While a sublayer of a layer goes back."""
        sizes, lower, kind = self.sizes, self._sublayers, self._kind(layer)
        is_attention = sublayer == "attention"
        on_top = lower.attention_backward(kind) if is_attention else lower.feed_forward_backward()
        parts: Parts = {WORKSPACE: workspace(self.job, kind)} if is_attention else {}
        recompute = self.job.config.model.recompute
        if recompute is Recompute.reversible:
            saved = lower.attention_saved(kind) if is_attention else lower.feed_forward_rerun()
            # gradients of both outputs, the outputs, and then the rebuilt input and what the other half gave
            streams = 7.0 * sizes.stream + sizes.hidden if is_attention else 4.0 * sizes.stream
            stored = self._stored(layer)
            layer_bytes = saved + on_top + lower.result
        else:
            saved = lower.attention_saved(kind) + (0 if is_attention else lower.feed_forward_saved())
            streams = 3.0 * sizes.stream
            stored = self._stored(layer) + 2 * sizes.stream
            layer_bytes = saved + on_top
        return parts | {STREAMS: streams, STORED: float(stored), LAYER: float(layer_bytes)}
