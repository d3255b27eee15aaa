"""Peak memory of a step on one rank: the largest of its snapshots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from reformer_dist.config import Recompute, TaskKind
from reformer_dist.planning.sizes import JobSpec, Sizes
from reformer_dist.planning.stack import ATTENTION, FEED_FORWARD, LAYER, STORED, STREAMS, WORKSPACE, StackMemory
from reformer_dist.planning.states import (
    AVERAGE,
    BUFFERS,
    CHECKPOINT_COPY,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    MemoryBreakdown,
    ModelStateMemory,
    ParameterCount,
)

LOSS, SOURCE = "loss", "encoder output"
CATEGORIES = (
    WEIGHTS,
    GRADIENTS,
    OPTIMIZER,
    BUFFERS,
    AVERAGE,
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
    """Bytes of each category at one point of a step."""

    name: str
    parts: MemoryBreakdown

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class StepMemory:
    """Memory of a rank's tensors over a step."""

    job: JobSpec
    count: ParameterCount

    def peak(self) -> MemorySnapshot:
        """The largest snapshot of a step after the first, when optimizer states exist."""
        return max(self.snapshots(), key=lambda snapshot: snapshot.total)

    def snapshots(self) -> Iterator[MemorySnapshot]:
        states = ModelStateMemory(self.job, self.count)
        held = states.held()

        def snapshot(label: str, *parts: MemoryBreakdown) -> MemorySnapshot:
            total: Counter[str] = Counter()
            for part in (held, *parts):
                total.update(part)
            return MemorySnapshot(label, {name: float(total[name]) for name in CATEGORIES if total[name]})

        if states.stage == 3:
            yield snapshot("all-gather of weights", states.gathering(), {STREAMS: 2.0 * self.sizes.stream})
        yield snapshot("loss", self._loss(), self._source(), states.during_backward(0, 0))
        reduced = self.count.above
        for layer in reversed(range(self.decoder.n_layers)):
            for sublayer, fresh in self.decoder.backward_order(layer):
                parts = self.decoder.backward(layer, sublayer), self._source(layer, sublayer)
                name = f"backward of layer {layer}, {sublayer}"
                yield snapshot(name, *parts, states.during_backward(reduced, fresh))
            reduced += self.decoder.unshared_parameters(layer)
        if self.encoder:
            reduced += self.count.above_encoder
            for layer in reversed(range(self.encoder.n_layers)):
                for sublayer, fresh in self.encoder.backward_order(layer):
                    # the embedding's gradient is not reduced before that of the source tokens is added
                    state_parts = states.during_backward(reduced, self.count.embedding + fresh)
                    name = f"backward of encoder layer {layer}, {sublayer}"
                    yield snapshot(name, self.encoder.backward(layer, sublayer), state_parts)
                reduced += self.encoder.unshared_parameters(layer)
        yield snapshot("gradient reduction", states.in_reduction())
        yield snapshot("optimizer step", states.during_step())

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.job)

    @property
    def decoder(self) -> StackMemory:
        """The stack below the head, also of models without an encoder."""
        return StackMemory(self.job, self.count.blocks)

    @property
    def encoder(self) -> StackMemory | None:
        return StackMemory(self.job.encoder, self.count.encoder_blocks) if self.job.encoder else None

    def _source(self, layer: int | None = None, sublayer: str = FEED_FORWARD) -> MemoryBreakdown:
        """During the decoder's passes: tensors saved by the encoder, its output, and the gradients of its output.

        layer: the decoder layer in backward; the layers above it have accumulated their gradients of the source.
        """
        if self.encoder is None:
            return {}
        stream, top = self.encoder.sizes.stream, self.decoder.n_layers - 1
        grads = 0 if layer is None else (layer < top) + (sublayer == ATTENTION)
        # the mean of the top layer's streams, its norm and, if reversible, the streams themselves
        n_streams = 4.0 if self.job.config.model.recompute is Recompute.reversible else 2.0
        return {SOURCE: (n_streams + grads) * stream, STORED: float(self.encoder.stored(self.encoder.n_layers))}

    def _loss(self) -> MemoryBreakdown:
        """At the head: the outputs of the last layer, their mean, and gradients."""
        sizes = self.sizes
        loss = self._loss_of_rows() if self._labels_rows else self._loss_of_tokens()
        return {
            STREAMS: 3.0 * sizes.stream,
            LOSS: float(sizes.hidden + sizes.stream + loss),
            STORED: float(self.decoder.stored(self.decoder.n_layers)),
        }

    @property
    def _labels_rows(self) -> bool:
        return self.job.config.task.kind in (TaskKind.sequence_classification, TaskKind.question_answering)

    def _loss_of_tokens(self) -> int:
        """With the logits of the last chunk in memory."""
        model = self.job.config.model
        chunk = min(model.loss_chunk, self.sizes.tokens) * self.job.vocab_size * 4
        return self.job.vocab_size * model.table_width * 4 + 3 * chunk

    def _loss_of_rows(self) -> int:
        """For the start and end of an answer: logits, masked logits, exponentials and gradients."""
        is_answer = self.job.config.task.kind is TaskKind.question_answering
        return 5 * self.sizes.tokens * 2 * 4 if is_answer else 0
