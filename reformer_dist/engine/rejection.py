"""Rejects a step of ZeRO by the norm of its gradient, at the place where DeepSpeed skips those that overflow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Accepts = Callable[[float], bool]
"""Called with the norm of a gradient before clipping; False rejects the step."""


@contextmanager
def asked_before_update(optimizer: Any, stage: int, accepts: Accepts | None) -> Iterator[list[float]]:
    """Within the block, a step of ZeRO's optimizer changes nothing unless `accepts` its gradient's norm.

    Yields a list that receives the norm of a rejected gradient. Every rank has the norm of the whole gradient,
    after DeepSpeed's reduction and before its update. An infinite one in its place makes the optimizer drop the
    gradients, and leave weights, master weights and moments alone, as at an overflow.
    """
    rejected: list[float] = []
    if accepts is None:
        yield rejected
        return
    # stage 3 combines the norms of its groups only where it uses them
    name = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
    measure = getattr(optimizer, name)

    def measured(*args: Any, **kwargs: Any) -> Any:
        found = measure(*args, **kwargs)
        norms = torch.stack([torch.as_tensor(each).double().cpu() for each in (found if stage == 3 else [found])])
        if not bool((norms.isfinite() & (norms >= 0)).all()):  # -1 stands for a norm that is not finite
            return found
        norm = float(torch.linalg.vector_norm(norms)) / float(optimizer.loss_scale)
        if not math.isfinite(norm) or accepts(norm):
            return found
        rejected.append(norm)
        return [torch.tensor(math.inf)] if stage == 3 else math.inf

    setattr(optimizer, name, measured)
    try:
        yield rejected
    finally:
        delattr(optimizer, name)
