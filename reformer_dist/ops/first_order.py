"""Autograd functions whose backward can't be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

Backward = Callable[..., Any]


class FirstOrderFunction(torch.autograd.Function):
    """An autograd function for ordinary backward passes; torch.func transforms are refused by name."""

    what: str
    """The operation, for messages."""
    way_out: str
    """What to use instead."""

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        cls.refuse_transforms()
        # modes need not see its many small operations: the tensors that it reads are its arguments
        with torch._C.DisableTorchFunction():
            return super().apply(*args, **kwargs)

    @classmethod
    def refuse_transforms(cls) -> None:
        """Raises RuntimeError inside a transform of torch.func, such as grad, vjp, jvp or vmap."""
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{cls.what}: torch.func transforms are not supported; use loss.backward() or "
                f"torch.autograd.grad, which also differentiate torch.func.functional_call, or {cls.way_out}"
            )


def first_order(backward: Backward) -> Backward:
    """Decorator of `FirstOrderFunction.backward`: runs without a graph; create_graph=True raises RuntimeError."""

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        # the grad mode inside a backward pass is its create_graph
        if torch.is_grad_enabled():
            function = ctx._forward_cls
            raise RuntimeError(
                f"create_graph=True: the backward of {function.what} can't be differentiated again; "
                f"omit it, or {function.way_out}"
            )
        return backward(ctx, *grads)

    return checked
