"""A reversible layer as one autograd function: backward rebuilds its input from its output (paper, section 3).

All that backward needs is in the autograd context and on a tape that belongs to one forward call: two forwards
may precede a backward. Parameters are inputs of the function, so that each gradient leaves through the outer
graph exactly once, which is what ZeRO's hooks count on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    """A function of one stream and the parameters that it uses. Calling it again gives the same result."""

    def __init__(self, function: Callable[[Tensor], Tensor], parameters: Iterable[Tensor]) -> None:
        self.function = function
        self.trained = [p for p in parameters if p.requires_grad]

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def grads(self, x: Tensor, d_out: Tensor, autocast: _Autocast) -> tuple[Tensor, list[Tensor | None]]:
        """Runs again from x; returns the output, and gradients of x and of the trained parameters."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            # the forward alone: a backward runs in the dtypes that its forward left
            with autocast.again():
                out = self.function(x)
            found = torch.autograd.grad(
                out, (x, *self.trained), d_out.to(out.dtype), allow_unused=True, materialize_grads=False
            )
        return out.detach(), list(found)


def reversible_step(x1: Tensor, x2: Tensor, f: Sublayer, g: Sublayer, tape: Tape) -> tuple[Tensor, Tensor]:
    """y1 = x1 + f(x2), y2 = x2 + g(y1); steps must form a chain, and backward run through it once."""
    y1, y2 = _ReversibleStep.apply(x1, x2, f, g, tape, *f.trained, *g.trained)
    return y1, y2


class _Autocast:
    """The autocast state of the forward call, which backward has left."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.enabled = torch.is_autocast_enabled(device_type)
        self.dtype = torch.get_autocast_dtype(device_type)

    def again(self) -> torch.autocast:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)


class _ReversibleStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x1: Tensor, x2: Tensor, f: Sublayer, g: Sublayer, tape: Tape, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.f, ctx.g, ctx.tape = f, g, tape
        ctx.autocast = _Autocast(x1.device.type)
        ctx.is_lowest = tape.streams is None
        y1 = x1 + f(x2)
        y2 = x2 + g(y1)
        tape.streams = (y1.detach(), y2.detach())
        return y1, y2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_y1, d_y2 = grads
        y1, y2 = ctx.tape.take()
        out, (d_through_g, *g_grads) = ctx.g.grads(y1, d_y2, ctx.autocast)
        x2 = y2 - out
        d_x1 = d_y1 if d_through_g is None else d_y1 + d_through_g
        out, (d_through_f, *f_grads) = ctx.f.grads(x2, d_x1, ctx.autocast)
        # below the lowest layer nobody takes the streams: a second backward must find none
        ctx.tape.streams = None if ctx.is_lowest else (y1 - out, x2)
        d_x2 = d_y2 if d_through_f is None else d_y2 + d_through_f
        return (d_x1, d_x2, None, None, None, *f_grads, *g_grads)
