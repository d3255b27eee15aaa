"""Fragments: ranges of flattened parameters, in which checkpoints store weights and moments."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("fp32", *MOMENTS)
"""Tensors stored per fragment under AdamW: the master weights and Adam's moments."""
ELEMENT_SIZE = 4  # bytes of a float32


def is_finite(values: Tensor) -> bool:
    """Whether no value is infinite or nan, in one pass without temporaries unless the sum overflows."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


@dataclass(frozen=True)
class Fragment:
    """The range of a parameter that this rank owns, with its float32 master copy."""

    name: str
    offset: int
    length: int
    master: Tensor
    """Flat or parameter-shaped float32 tensor that the optimizer holds as its parameter."""
    start: int
    """Offset of the range in `master`."""
    state: dict[str, Tensor]
    """The optimizer's state of `master`, and averages of it; moments are absent before the first step."""
    kinds: tuple[str, ...] = KINDS
    """Tensors stored with an element for each one of the range."""
    factors: dict[str, Tensor] = field(default_factory=dict)
    """State of the whole parameter, of any shape; empty unless the range begins at its first element."""

    def values(self, kind: str) -> Tensor:
        """The range's values [length] as a live view; zeros for moments that do not exist yet."""
        source = self.master.detach() if kind == "fp32" else self.state.get(kind)
        if source is None:
            return torch.zeros(self.length)
        return source.view(-1)[self.start : self.start + self.length]

    def tensors(self) -> dict[str, Tensor]:
        """All that is stored, flat, by kind, as live views."""
        factors = {kind: values.detach().view(-1) for kind, values in self.factors.items()}
        return {kind: self.values(kind).detach() for kind in self.kinds} | factors

    def is_finite(self) -> bool:
        return all(map(is_finite, self.tensors().values()))

    @property
    def adam_step(self) -> int:
        return int(self.state["step"]) if "step" in self.state else 0
