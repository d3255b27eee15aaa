"""Search space of a sweep: choices or an interval for each configuration key."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choices:
    values: tuple[str, ...]
    """In the syntax of an override."""


@dataclass(frozen=True)
class Interval:
    low: float
    high: float
    step: float | None = None
    """None: any number in the closed interval."""
    is_integer: bool = False
    is_log: bool = False

    def format(self, value: float) -> str:
        """A value in the syntax of an override."""
        return str(round(value)) if self.is_integer else repr(float(value))

    def values(self) -> tuple[str, ...]:
        """All values of an interval with a step."""
        assert self.step is not None
        count = int((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(self.format(round(self.low + index * self.step, 12)) for index in range(count))


Dimension = Choices | Interval
SearchSpace = dict[str, Dimension]
