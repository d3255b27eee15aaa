"""Caches of tensors that depend on their arguments only, not on the state of PyTorch at the first call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def cache_tensors(maxsize: int) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """`functools.lru_cache` for a function that returns a tensor, which callers must not modify.

    Tensors are cached without the flag of inference mode, which would forbid their use in autograd later. Under a
    mode in which PyTorch makes other tensors than its own, such as FakeTensorMode, nothing is cached or reused.
    The function itself must name dtype and device, since the defaults of both can be changed.
    """

    def decorate(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        @functools.lru_cache(maxsize)
        def cached(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            with torch.inference_mode(False):
                return function(*args, **kwargs)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            is_ordinary = type(torch.empty(0, dtype=torch.float32, device="cpu")) is Tensor
            return function(*args, **kwargs) if not is_ordinary else cached(*args, **kwargs)  # type: ignore[arg-type]

        return call

    return decorate
