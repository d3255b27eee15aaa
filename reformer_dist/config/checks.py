"""Checks of names, types and bounds for all groups. Messages have the form "key=value: what would be right"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from reformer_dist.config.renamed import refuse_renamed
from reformer_dist.errors import ConfigError

T = TypeVar("T")
LARGEST_INT32 = 2**31 - 1
LARGEST_INT64 = 2**63 - 1

# per annotation: the accepted type, and what a message calls it
PLAIN_TYPES: Mapping[type, tuple[type, str]] = {
    bool: (bool, "must be true or false"),
    int: (Integral, "must be a whole number"),
    float: (Real, "must be a number"),
    str: (str, "must be a string"),
}


class ConfigGroup:
    """Base of the configuration's dataclasses. Checks names, types and bounds when an instance is made.

    Hydra checks the types of a run that it composes. A configuration made by a program must be held to the same
    rules: a string never equals a member of an Enum, so that each comparison with it would silently be false.
    """

    _prefix: ClassVar[str]
    """Of a field's key: "model." for model.dim."""

    def __init_subclass__(cls, prefix: str) -> None:
        cls._prefix = prefix

    def __new__(cls, *args: Any, **values: Any) -> Any:
        for name, value in values.items():
            refuse_renamed(f"{cls._prefix}{name}", value)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Raises ConfigError. Turns the names of choices into members of their Enum."""
        hints = get_type_hints(type(self))
        for each in fields(self):  # type: ignore[arg-type]
            key = f"{self._prefix}{each.name}"
            value = _typed(getattr(self, each.name), hints[each.name], key)
            setattr(self, each.name, value)
            if "bounds" in each.metadata and value is not None:
                each.metadata["bounds"].check(key, value)


@dataclass(frozen=True)
class Bounds:
    """Range of a number. Infinity and NaN are never inside."""

    least: float | None
    above: float | None
    most: float | None
    below: float | None
    hint: str

    def check(self, key: str, value: float) -> None:
        fits = (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
            and value < math.inf
        )
        require(fits, key, value, self._right(value))

    def _right(self, value: float) -> str:
        # a bound that is only there against overflow is of no interest below it
        has_most = self.most is not None and (self.most < LARGEST_INT32 or value > self.most)
        parts = [
            *([f"at least {self.least}"] if self.least is not None else []),
            *([f"above {self.above}"] if self.above is not None else []),
            *([f"at most {self.most}"] if has_most else []),
            *([f"below {self.below}"] if self.below is not None else []),
            *(["finite"] if value == math.inf else []),
        ]
        hint = f"; {self.hint}" if self.hint and has_most else ""
        return f"must be {' and '.join(parts)}{hint}"


def bounded(
    default: T,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    hint: str = "",
) -> T:
    """A field of a ConfigGroup with bounds on its value; None passes.

    least, most: inclusive. above, below: exclusive. A whole number is at most 2**31 - 1 unless `most` is given.
    hint: what to do instead where the value is too large.
    """
    if most is None and below is None and isinstance(least, int) and not isinstance(default, float):
        most = LARGEST_INT32
    bounds = Bounds(least, above, most, below, hint)
    return field(default=default, metadata={"bounds": bounds})


def require(condition: bool, key: str, value: object, right: str) -> None:
    """Raise ConfigError "key=value: right" unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}={value}: {right}")


def _typed(value: Any, kind: Any, key: str) -> Any:
    parts = get_args(kind)
    if type(None) in parts:
        if value is None:
            return None
        (kind,) = (part for part in parts if part is not type(None))
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        shown = repr(value) if isinstance(value, str) else value
        require(isinstance(value, list | tuple), key, shown, "must be a list, such as [a, b]")
        return [_typed(element, item, f"{key}[{index}]") for index, element in enumerate(value)]
    if get_origin(kind) is dict:
        require(isinstance(value, Mapping), key, value, "must be a mapping, such as {key: value}")
        return {
            _typed(k, get_args(kind)[0], key): _typed(v, get_args(kind)[1], f"{key}.{k}") for k, v in value.items()
        }
    if is_dataclass(kind):
        assert isinstance(kind, type)
        require(isinstance(value, kind), key, value, f"must be a {kind.__name__}")
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _member(value, kind, key)
    if kind in PLAIN_TYPES:
        wanted, right = PLAIN_TYPES[kind]
        # bool is a subclass of int
        fits = isinstance(value, wanted) and isinstance(value, bool) == (kind is bool)
        require(fits, key, repr(value) if isinstance(value, str) else value, right)
    return value


def _member(value: Any, kind: type[Enum], key: str) -> Enum:
    if isinstance(value, kind):
        return value
    member = kind.__members__.get(value) if isinstance(value, str) else None
    if member is None:
        raise ConfigError(f"{key}={value}: must be {one_of(list(kind.__members__))}")
    return member


def one_of(names: Sequence[str]) -> str:
    """ "a, b or c"."""
    return " or ".join([*filter(None, [", ".join(names[:-1])]), names[-1]])


def nearest_divisors(whole: int, value: int) -> str:
    """The divisors of `whole` nearest to `value`, which is none: "2 or 4" for 8 and 3."""
    below = next((number for number in range(min(value - 1, whole), 0, -1) if whole % number == 0), None)
    above = next((number for number in range(value + 1, whole + 1) if whole % number == 0), None)
    return " or ".join(str(number) for number in (below, above) if number is not None)
