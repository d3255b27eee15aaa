"""What a sweep tries: for each key of the configuration some choices, or an interval."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choices:
    values: tuple[str, ...]
    """As they stand in an override."""


@dataclass(frozen=True)
class Interval:
    low: float
    high: float
    step: float | None = None
    """None: any number between, both ends included."""
    is_integer: bool = False
    is_log: bool = False

    def word(self, value: float) -> str:
        """A value as it stands in an override."""
        return str(round(value)) if self.is_integer else repr(float(value))

    def values(self) -> tuple[str, ...]:
        """Every value of an interval that has a step."""
        assert self.step is not None
        count = int((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(self.word(round(self.low + index * self.step, 12)) for index in range(count))


Dimension = Choices | Interval
SearchSpace = dict[str, Dimension]
