"""A reversible layer as one autograd function: backward rebuilds its input from its output (paper, section 3).

All that backward needs is in the autograd context and on a tape that belongs to one forward call: two forwards
may precede a backward. Parameters are inputs of the function, so that each gradient leaves through the outer
graph exactly once, which is what ZeRO's hooks count on.

A layer is a chain of steps (a, b) -> (b, a + F(b)), one for each sublayer F. Of two steps the result is
y1 = x1 + F(x2), y2 = x2 + G(y1), the paper's; a third reads y2 and adds to y1, and the streams change places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Tape:
    """The streams behind the newest layer that has run: forward writes, backward unwinds."""

    def __init__(self) -> None:
        self.streams: tuple[Tensor, Tensor] | None = None

    def take(self) -> tuple[Tensor, Tensor]:
        if self.streams is None:
            raise RuntimeError("a reversible stack can be run backward once; call forward again")
        streams, self.streams = self.streams, None
        return streams


class Sublayer:
    """A function of one stream and of other tensors: parameters, or what an encoder gave.

    Calling it again gives the same result.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], others: Iterable[Tensor]) -> None:
        self.function = function
        self.trained = [tensor for tensor in others if tensor.requires_grad]

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def grads(self, x: Tensor, d_out: Tensor, autocast: _Autocast) -> tuple[Tensor, list[Tensor | None]]:
        """Runs again from x; returns the output, and gradients of x and of the other tensors that want one."""
        return self._again(self.function, x, d_out, autocast)

    def _again(
        self, function: Callable[[Tensor], Tensor], x: Tensor, d_out: Tensor, autocast: _Autocast
    ) -> tuple[Tensor, list[Tensor | None]]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            # the forward alone: a backward runs in the dtypes that its forward left
            with autocast.again():
                out = function(x)
            found = torch.autograd.grad(
                out, (x, *self.trained), d_out.to(out.dtype), allow_unused=True, materialize_grads=False
            )
        return out.detach(), list(found)


class TokenwiseSublayer(Sublayer):
    """A function of each token for itself, so `chunk` tokens can go through at a time (0: all at once).

    Backward too takes one chunk after another: what the recompute of a chunk keeps for its backward is gone before
    the next chunk runs, and nothing is computed more than once for it.
    """

    def __init__(self, function: Callable[[int, Tensor], Tensor], others: Iterable[Tensor], chunk: int) -> None:
        """function: of the number of the first token at hand, and the tokens [B, n, dim]."""
        super().__init__(partial(function, 0), others)
        self._part, self._chunk = function, chunk

    def __call__(self, x: Tensor) -> Tensor:
        if not self._is_parted(x):
            return self.function(x)
        return torch.cat([self._part(start, part) for start, part in self._parts(x)], dim=1)

    def grads(self, x: Tensor, d_out: Tensor, autocast: _Autocast) -> tuple[Tensor, list[Tensor | None]]:
        if not self._is_parted(x):
            return super().grads(x, d_out, autocast)
        outs, d_inputs, totals = [], [], None
        for (start, part), (_, d_part) in zip(self._parts(x), self._parts(d_out), strict=True):
            out, (d_input, *found) = self._again(partial(self._part, start), part, d_part, autocast)
            outs.append(out)
            d_inputs.append(torch.zeros_like(part) if d_input is None else d_input)
            totals = found if totals is None else [_sum(*pair) for pair in zip(totals, found, strict=True)]
        assert totals is not None
        return torch.cat(outs, dim=1), [torch.cat(d_inputs, dim=1), *totals]

    def _is_parted(self, x: Tensor) -> bool:
        return 0 < self._chunk < x.shape[1]

    def _parts(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The number of the first token of each chunk, and the chunk."""
        return zip(range(0, x.shape[1], self._chunk), x.split(self._chunk, dim=1), strict=True)


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """The total is used up."""
    return part if total is None else total if part is None else total.add_(part)


def reversible_steps(x1: Tensor, x2: Tensor, sublayers: Sequence[Sublayer], tape: Tape) -> tuple[Tensor, Tensor]:
    """A layer: for each of its two or more sublayers F, one step (a, b) -> (b, a + F(b)).

    Layers must form a chain, and backward run through it once. What an encoder gave is an input of every layer
    that reads it, so its gradients add up before the encoder's own backward, which runs once.
    """
    others = [tensor for sublayer in sublayers for tensor in sublayer.trained]
    y1, y2 = _ReversibleSteps.apply(x1, x2, sublayers, tape, *others)
    return y1, y2


class _Autocast:
    """The autocast state of the forward call, which backward has left."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.enabled = torch.is_autocast_enabled(device_type)
        self.dtype = torch.get_autocast_dtype(device_type)

    def again(self) -> torch.autocast:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)


class _ReversibleSteps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x1: Tensor, x2: Tensor, sublayers: Sequence[Sublayer], tape: Tape, *others: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.sublayers, ctx.tape = sublayers, tape
        ctx.autocast = _Autocast(x1.device.type)
        ctx.is_lowest = tape.streams is None
        a, b = x1, x2
        for sublayer in sublayers:
            a, b = b, a + sublayer(b)
        tape.streams = (a.detach(), b.detach())
        return a, b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.tape.take()
        d_a, d_b = grads
        of_others: list[Tensor | None] = []
        for sublayer in reversed(ctx.sublayers):
            out, (through, *its_grads) = sublayer.grads(a, d_b, ctx.autocast)
            a, b = b - out, a
            d_a, d_b = d_b, d_a if through is None else d_a + through
            of_others = its_grads + of_others
        # below the lowest layer nobody takes the streams: a second backward must find none
        ctx.tape.streams = None if ctx.is_lowest else (a, b)
        return (d_a, d_b, None, None, *of_others)
