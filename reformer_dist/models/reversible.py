"""A reversible layer as one autograd function: backward reconstructs its input from its output (paper, section 3).

All state of backward is in the autograd context and on a tape that belongs to one forward call, so two forwards
may precede a backward. Parameters are inputs of the function, so that each gradient leaves through the outer graph
exactly once, as ZeRO's hooks expect. So are all other trained tensors that the forward reads, such as a gate in a
hook of a sublayer.

A layer is a chain of steps (a, b) -> (b, a + F(b)), one per sublayer F. Two steps are the paper's
y1 = x1 + F(x2), y2 = x2 + G(y1); a third reads y2 and adds to y1, which swaps the streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reformer_dist.models.recompute import (
    WAY_OUT,
    LayerWeights,
    ReachedTensors,
    uncached_parametrizations,
    without_random_draws,
)
from reformer_dist.ops.first_order import FirstOrderFunction, first_order

Streams = tuple[Tensor, Tensor]


class Tape:
    """Output streams of the most recent layer: forward overwrites them, backward unwinds them."""

    def __init__(self) -> None:
        self.streams: Streams | None = None
        self._versions: list[int] = []

    def put(self, streams: Streams) -> None:
        self.streams = (streams[0].detach(), streams[1].detach())
        self._versions = [stream._version for stream in streams]

    def take(self) -> Streams:
        if self.streams is None:
            raise RuntimeError(
                "a reversible stack can run backward once per forward; call forward again, add the losses before "
                f"one backward, or {WAY_OUT}"
            )
        streams, self.streams = self.streams, None
        return streams

    def check_inputs(self, inputs: Streams) -> None:
        """Raises RuntimeError unless the inputs of a layer are float32, and the outputs of the layer below."""
        below = inputs if self.streams is None else self.streams
        versions = [x._version for x in inputs] if self.streams is None else self._versions
        for x, stream, version in zip(inputs, below, versions, strict=True):
            if x.dtype != torch.float32 or x.data_ptr() != stream.data_ptr() or x._version != version:
                raise RuntimeError(
                    "model.recompute=reversible: a hook changed the streams between two layers, or FSDP did by "
                    "cast_forward_inputs=True, so backward can't reconstruct them; change the "
                    f"outputs of sublayers instead, set cast_forward_inputs=False, or {WAY_OUT}"
                )


class Sublayer:
    """A deterministic function of one stream and of other tensors: parameters, or an encoder's output."""

    def __init__(self, function: Callable[[Tensor], Tensor], others: Iterable[Tensor]) -> None:
        self.function = function
        self.trained = [tensor for tensor in others if tensor.requires_grad]
        self._reached: set[int] = set()
        """ids of the members of `trained` that the forward read."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def run(self, x: Tensor) -> Tensor:
        """The output, without a graph; adds to `trained` what the function reads besides."""
        with torch.no_grad(), ReachedTensors(lambda _: not torch.is_grad_enabled()) as reached:
            out = self(x.detach())
        self._reached = set(reached.by_id)
        listed = {id(tensor) for tensor in self.trained}
        self.trained += [tensor for tensor in reached.by_id.values() if id(tensor) not in listed]
        return out

    def grads(self, x: Tensor, d_out: Tensor, autocast: _Autocast) -> tuple[Tensor, list[Tensor | None]]:
        """Recomputes from x; returns the output, and the gradients of x and of `trained`."""
        return self._recompute(self.function, x, d_out, autocast)

    def _recompute(
        self, function: Callable[[Tensor], Tensor], x: Tensor, d_out: Tensor, autocast: _Autocast
    ) -> tuple[Tensor, list[Tensor | None]]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            # only the forward is under autocast: backward runs in the dtypes that the forward chose
            with autocast.restore(), self._reached_again():
                out = function(x)
            grads = torch.autograd.grad(
                out, (x, *self.trained), d_out.to(out.dtype), allow_unused=True, materialize_grads=False
            )
        return out.detach(), list(grads)

    @contextmanager
    def _reached_again(self) -> Iterator[None]:
        """Raises RuntimeError unless the body reads the trained tensors of the forward, and no other parameter."""
        with ReachedTensors(lambda y: isinstance(y, nn.Parameter) or id(y) in self._reached) as reached:
            yield
        changed = self._reached ^ set(reached.by_id)
        if changed:
            raise RuntimeError(
                f"model.recompute=reversible: the recompute of a layer in backward read {len(changed)} other "
                f"trained tensors than its forward, so gradients would be lost; {WAY_OUT}"
            )


class TokenwiseSublayer(Sublayer):
    """A token-wise function, which runs on `chunk` tokens at a time (0: all at once).

    Backward is chunked as well: the activations of one chunk's recompute are freed before the next chunk runs, and
    nothing is computed more than once.
    """

    def __init__(self, function: Callable[[int, Tensor], Tensor], others: Iterable[Tensor], chunk: int) -> None:
        """function: takes the index of the first token, and the tokens [B, n, dim]."""
        super().__init__(partial(function, 0), others)
        self._chunk_function, self._chunk = function, chunk

    def __call__(self, x: Tensor) -> Tensor:
        # where autograd records, chunks save no memory, and under autocast each would keep a copy of the weights
        if torch.is_grad_enabled() or not self._is_chunked(x):
            return self.function(x)
        return torch.cat([self._chunk_function(start, part) for start, part in self._split(x)], dim=1)

    def grads(self, x: Tensor, d_out: Tensor, autocast: _Autocast) -> tuple[Tensor, list[Tensor | None]]:
        if not self._is_chunked(x):
            return super().grads(x, d_out, autocast)
        outs, d_inputs = [], []
        totals: list[Tensor | None] = [None] * len(self.trained)
        for (start, part), (_, d_part) in zip(self._split(x), self._split(d_out), strict=True):
            function = partial(self._chunk_function, start)
            out, (d_input, *grads) = self._recompute(function, part, d_part, autocast)
            outs.append(out)
            d_inputs.append(torch.zeros_like(part) if d_input is None else d_input)
            totals = [_accumulate(*pair) for pair in zip(totals, grads, strict=True)]
        return torch.cat(outs, dim=1), [torch.cat(d_inputs, dim=1), *totals]

    def _is_chunked(self, x: Tensor) -> bool:
        return 0 < self._chunk < x.shape[1]

    def _split(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The index of the first token of each chunk, and the chunk."""
        return zip(range(0, x.shape[1], self._chunk), x.split(self._chunk, dim=1), strict=True)


def _accumulate(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """The sum in float32, in place of total."""
    if total is None or grad is None:
        return total if grad is None else grad.to(torch.promote_types(grad.dtype, torch.float32))
    return total.add_(grad)


def reversible_steps(
    x1: Tensor, x2: Tensor, sublayers: Sequence[Sublayer], tape: Tape, weights: LayerWeights
) -> Streams:
    """Runs a layer: one step (a, b) -> (b, a + F(b)) for each of its two or more sublayers F.

    Layers must form a chain, through which backward runs once. An encoder's output is an input of every layer that
    attends to it, so its gradients are summed before the encoder's own backward, which runs once. Raises
    RuntimeError if backward could not repeat the layer.
    """
    _ReversibleSteps.refuse_transforms()
    tape.check_inputs((x1, x2))
    a, b = x1.detach(), x2.detach()
    with uncached_parametrizations(), without_random_draws(x1.device), torch.no_grad():
        for sublayer in sublayers:
            a, b = b, a + sublayer.run(b)
    others = [tensor for sublayer in sublayers for tensor in sublayer.trained]
    y1, y2 = _ReversibleSteps.apply(x1, x2, (a, b), sublayers, tape, weights, *others)
    return y1, y2


class _Autocast:
    """Autocast state of the forward call, restored for the recompute."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.enabled = torch.is_autocast_enabled(device_type)
        self.dtype = torch.get_autocast_dtype(device_type)
        self.caches = torch.is_autocast_cache_enabled()

    def restore(self) -> torch.autocast:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=self.caches)


class _ReversibleSteps(FirstOrderFunction):
    what = "a reversible layer"
    way_out = "set model.recompute=none, with model.layers=[exact] or model.attention_backend=reference"

    @staticmethod
    def forward(
        ctx: Any,
        x1: Tensor,
        x2: Tensor,
        outputs: Streams,
        sublayers: Sequence[Sublayer],
        tape: Tape,
        weights: LayerWeights,
        *others: Tensor,
    ) -> Streams:
        ctx.sublayers, ctx.tape, ctx.weights = sublayers, tape, weights
        ctx.autocast = _Autocast(x1.device.type)
        ctx.is_lowest = tape.streams is None
        tape.put(outputs)
        return outputs

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.tape.take()
        d_a, d_b = grads
        d_others: list[Tensor | None] = []
        with ctx.weights.restored():
            for sublayer in reversed(ctx.sublayers):
                out, (d_x, *d_trained) = sublayer.grads(a, d_b, ctx.autocast)
                a, b = b - out, a
                d_a, d_b = d_b, d_a if d_x is None else d_a + d_x
                d_others = d_trained + d_others
        # the streams below the lowest layer are dropped, so that a second backward raises
        ctx.tape.streams = None if ctx.is_lowest else (a, b)
        return (d_a, d_b, None, None, None, None, *d_others)
