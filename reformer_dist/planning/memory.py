"""The highest memory of a step on one rank: snapshots of the step are computed, and the fullest is the peak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from reformer_dist.config import Recompute, TaskKind
from reformer_dist.planning.sizes import JobSpec, Sizes
from reformer_dist.planning.stack import ATTENTION, FEED_FORWARD, LAYER, STORED, STREAMS, WORKSPACE, StackMemory
from reformer_dist.planning.states import (
    BUFFERS,
    CHECKPOINT_COPY,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    MemoryBreakdown,
    ModelStateMemory,
    ParameterCount,
)

LOSS, SOURCE = "loss", "the source as read"
CATEGORIES = (
    WEIGHTS,
    GRADIENTS,
    OPTIMIZER,
    BUFFERS,
    CHECKPOINT_COPY,
    STREAMS,
    STORED,
    LAYER,
    WORKSPACE,
    SOURCE,
    LOSS,
)


@dataclass(frozen=True)
class MemorySnapshot:
    """A snapshot of a step, and the bytes of each part then."""

    name: str
    parts: MemoryBreakdown

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class StepMemory:
    """Memory of a rank's tensors in the course of a step."""

    job: JobSpec
    count: ParameterCount

    def peak(self) -> MemorySnapshot:
        """The fullest snapshot of a step (from the second on, when optimizer states exist)."""
        return max(self.snapshots(), key=lambda snapshot: snapshot.total)

    def snapshots(self) -> Iterator[MemorySnapshot]:
        states = ModelStateMemory(self.job, self.count)
        held = states.held()

        def snapshot(name: str, *parts: MemoryBreakdown) -> MemorySnapshot:
            total: Counter[str] = Counter()
            for some in (held, *parts):
                total.update(some)
            return MemorySnapshot(name, {part: float(total[part]) for part in CATEGORIES if total[part]})

        if states.stage == 3:
            yield snapshot("weights are gathered", states.gathering(), {STREAMS: 2.0 * self.sizes.stream})
        yield snapshot("loss", self._loss(), self._source(), states.during_backward(0, 0))
        done = self.count.above
        for layer in reversed(range(self.decoder.n_layers)):
            for sublayer, fresh in self.decoder.going_back(layer):
                parts = self.decoder.backward(layer, sublayer), self._source(layer, sublayer)
                name = f"backward of layer {layer}, {sublayer}"
                yield snapshot(name, *parts, states.during_backward(done, fresh))
            done += self.decoder.new_weights(layer)
        if self.encoder:
            done += self.count.above_encoder
            for layer in reversed(range(self.encoder.n_layers)):
                for sublayer, fresh in self.encoder.going_back(layer):
                    # the gradient of the table waits for that of the source's tokens
                    of_states = states.during_backward(done, self.count.embedding + fresh)
                    name = f"backward of encoder layer {layer}, {sublayer}"
                    yield snapshot(name, self.encoder.backward(layer, sublayer), of_states)
                done += self.encoder.new_weights(layer)
        yield snapshot("gradients are reduced", states.during_reduction())
        yield snapshot("weights move", states.during_step())

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.job)

    @property
    def decoder(self) -> StackMemory:
        """The stack under the head, in models that have no other too."""
        return StackMemory(self.job, self.count.blocks)

    @property
    def encoder(self) -> StackMemory | None:
        return StackMemory(self.job.encoder, self.count.encoder_blocks) if self.job.encoder else None

    def _source(self, layer: int | None = None, sublayer: str = FEED_FORWARD) -> MemoryBreakdown:
        """While the decoder is at work: what the encoder left for its backward, its result, and gradients of that.

        layer: the decoder's that goes back; those above it have added up what they want of the source.
        """
        if self.encoder is None:
            return {}
        stream, top = self.encoder.sizes.stream, self.decoder.n_layers - 1
        grads = 0 if layer is None else (layer < top) + (sublayer == ATTENTION)
        # the mean of the top layer's streams, the norm of that, and where they are the tape, the streams
        kept = 4.0 if self.job.config.model.recompute is Recompute.reversible else 2.0
        return {SOURCE: (kept + grads) * stream, STORED: float(self.encoder.stored(self.encoder.n_layers))}

    def _loss(self) -> MemoryBreakdown:
        """At the head: the last layers' outputs, their mean, and gradients."""
        sizes = self.sizes
        own = self._loss_of_rows() if self._labels_rows else self._loss_of_tokens()
        return {
            STREAMS: 3.0 * sizes.stream,
            LOSS: float(sizes.hidden + sizes.stream + own),
            STORED: float(self.decoder.stored(self.decoder.n_layers)),
        }

    @property
    def _labels_rows(self) -> bool:
        return self.job.config.task.kind in (TaskKind.sequence_classification, TaskKind.question_answering)

    def _loss_of_tokens(self) -> int:
        """While the last logits are at hand."""
        model = self.job.config.model
        chunk = min(model.loss_chunk, self.sizes.tokens) * self.job.vocab_size * 4
        return self.job.vocab_size * model.table_width * 4 + 3 * chunk

    def _loss_of_rows(self) -> int:
        """Of an answer's first and last token: logits, without what is masked, exponentials and gradients."""
        is_answer = self.job.config.task.kind is TaskKind.question_answering
        return 5 * self.sizes.tokens * 2 * 4 if is_answer else 0
