"""Checks of names, types and bounds for all groups. Messages have the form "key=value: requirement"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from reformer_dist.config.keywords import refuse_unknown_keywords
from reformer_dist.config.renamed import refuse_renamed
from reformer_dist.errors import ConfigError

T = TypeVar("T")
LARGEST_INT32 = 2**31 - 1
LARGEST_INT64 = 2**63 - 1
MONTH = 30 * 24 * 3600  # seconds

# per annotation: the accepted type, and the requirement that a message states
PLAIN_TYPES: Mapping[type, tuple[type, str]] = {
    bool: (bool, "must be true or false"),
    int: (Integral, "must be a whole number"),
    float: (Real, "must be a number"),
    str: (str, "must be a string"),
}


class ConfigGroup:
    """Base of the configuration's dataclasses. Checks names, types and bounds when an instance is created.

    Hydra checks the types of a run that it composes. A configuration created in code must meet the same rules:
    a string never equals a member of an Enum, so each comparison with it would silently be false.
    """

    _prefix: ClassVar[str]
    """Prefix of the keys: "model." for model.dim."""
    counterparts: ClassVar[Mapping[str, str]] = {}
    """Keys by their names in other systems."""

    def __init_subclass__(cls, prefix: str) -> None:
        cls._prefix = prefix

    def __new__(cls, *args: Any, **values: Any) -> Any:
        for name, value in values.items():
            refuse_renamed(f"{cls._prefix}{name}", value)
        known = [option.name for option in fields(cls)]  # type: ignore[arg-type]
        refuse_unknown_keywords(cls.__name__, values, known, cls.counterparts)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Raises ConfigError. Turns the names of choices into members of their Enum."""
        hints = get_type_hints(type(self))
        for option in fields(self):  # type: ignore[arg-type]
            key = f"{self._prefix}{option.name}"
            value = _convert(getattr(self, option.name), hints[option.name], key)
            setattr(self, option.name, value)
            if "bounds" in option.metadata and value is not None:
                option.metadata["bounds"].check(key, value)


@dataclass(frozen=True)
class Bounds:
    """Range of a number. Infinity and NaN are never inside."""

    least: float | None
    above: float | None
    most: float | None
    below: float | None
    hint: str

    def check(self, key: str, value: float) -> None:
        """Raises ConfigError if the value is outside the range."""
        is_inside = (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
            and value < math.inf
        )
        parts = [*self.words(value), *(["finite"] if value == math.inf else [])]
        hint = f"; {self.hint}" if self.hint and self._mentions_most(value) else ""
        require(is_inside, key, value, f"must be {' and '.join(parts)}{hint}")

    def words(self, value: float = 0) -> list[str]:
        """The bounds that matter to a user with this value, such as "at least 1"."""
        return [
            *([f"at least {self.least}"] if self.least is not None else []),
            *([f"above {self.above}"] if self.above is not None else []),
            *([f"at most {self.most}"] if self._mentions_most(value) else []),
            *([f"below {self.below}"] if self.below is not None else []),
        ]

    def _mentions_most(self, value: float) -> bool:
        """A bound that only prevents overflow is not worth mentioning below it."""
        return self.most is not None and (self.most < LARGEST_INT32 or value > self.most)


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
    return field(default=default, metadata={"bounds": Bounds(least, above, most, below, hint)})


def require(condition: bool, key: str, value: object, requirement: str) -> None:
    """Raise ConfigError "key=value: requirement" unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}={value}: {requirement}")


def _convert(value: Any, annotation: Any, key: str) -> Any:
    """The value in the annotated type: lists from tuples, members of an Enum from their names."""
    arguments = get_args(annotation)
    if type(None) in arguments:
        if value is None:
            return None
        (annotation,) = (argument for argument in arguments if argument is not type(None))
        arguments = get_args(annotation)
    shown = repr(value) if isinstance(value, str) else value
    if get_origin(annotation) is list:
        require(isinstance(value, list | tuple), key, shown, "must be a list, such as [a, b]")
        return [_convert_item(item, arguments[0], f"{key}[{index}]") for index, item in enumerate(value)]
    if get_origin(annotation) is dict:
        require(isinstance(value, Mapping), key, value, "must be a mapping, such as {key: value}")
        return {_convert(k, arguments[0], key): _convert(v, arguments[1], f"{key}.{k}") for k, v in value.items()}
    if annotation in PLAIN_TYPES:
        accepted, requirement = PLAIN_TYPES[annotation]
        # bool is a subclass of int
        is_valid = isinstance(value, accepted) and isinstance(value, bool) == (annotation is bool)
        require(is_valid, key, shown, requirement)
    elif isinstance(annotation, type) and issubclass(annotation, Enum) and not isinstance(value, annotation):
        names = list(annotation.__members__)
        require(isinstance(value, str) and value in names, key, value, f"must be {one_of(names)}")
        return annotation[value]
    elif isinstance(annotation, type) and is_dataclass(annotation):
        require(isinstance(value, annotation), key, value, f"must be a {annotation.__name__}")
    return value


def _convert_item(item: Any, annotation: Any, key: str) -> Any:
    """An item of a list. A group may be a mapping there, as in a saved configuration."""
    if isinstance(item, Mapping) and isinstance(annotation, type) and is_dataclass(annotation):
        return annotation(**{str(name): value for name, value in item.items()})
    return _convert(item, annotation, key)


def one_of(names: Sequence[str]) -> str:
    """Joins names as "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def nearest_divisors(whole: int, value: int) -> str:
    """The divisors of `whole` nearest to `value`, which does not divide it: "2 or 4" for 8 and 3."""
    small = [number for number in range(1, math.isqrt(whole) + 1) if whole % number == 0]
    divisors = {*small, *(whole // number for number in small)}
    below = max((number for number in divisors if number < value), default=None)
    above = min((number for number in divisors if number > value), default=None)
    return " or ".join(str(number) for number in (below, above) if number is not None)
