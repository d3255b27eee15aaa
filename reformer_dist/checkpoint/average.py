"""AverageRecord: what the stored averages of the weights mean, for the engine that makes them and for readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

EXPONENTIAL_KINDS = ("average",)
WINDOW_KINDS = ("block_average", "previous_average")


@dataclass(frozen=True)
class AverageRecord:
    """Averages of the weights after `updates` steps.

    Exponential: the tensors `average`. Window: steps are counted in blocks of `window`; `block_average` is the
    mean of the weights after the steps of the current block, `previous_average` of the block before it.
    """

    window: int | None
    """None for an exponential average."""
    updates: int = 0

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> AverageRecord:
        """Raises TypeError, KeyError or ValueError for a document that is not one."""
        window = document["window"]
        record = cls(None if window is None else int(window), int(document["updates"]))
        if record.updates < 0 or (record.window is not None and record.window < 1):
            raise ValueError(f"an average over {record.window} steps after {record.updates}")
        return record

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of tensors stored per fragment."""
        return EXPONENTIAL_KINDS if self.window is None else WINDOW_KINDS

    @property
    def in_block(self) -> int:
        """Window: steps in the current block, from 1 to `window`."""
        assert self.window is not None
        return (self.updates - 1) % self.window + 1 if self.updates else 0

    def combine(self, read: Callable[[str], Tensor]) -> Tensor:
        """The average, a new tensor. read: a tensor by its kind."""
        if self.window is None:
            return read("average").clone()
        block = read("block_average").clone()
        if self.updates <= self.window:  # the first block
            return block
        return block.lerp_(read("previous_average"), self.window / (self.window + self.in_block))
