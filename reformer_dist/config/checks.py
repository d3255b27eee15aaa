"""The few checks that every group uses; each message names the key, the value and what would be right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from numbers import Integral, Real
from typing import Any, get_args, get_origin, get_type_hints

from reformer_dist.errors import ConfigError

# what a field of each type takes, and how a message says so
PLAIN_TYPES: Mapping[type, tuple[type, str]] = {
    bool: (bool, "must be true or false"),
    int: (Integral, "must be a whole number"),
    float: (Real, "must be a number"),
}


def require(condition: bool, key: str, value: object, right: str) -> None:
    """Raise ConfigError "key=value: right" unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}={value}: {right}")


def check_types(config: Any, group: str) -> None:
    """Each field of a dataclass holds what its annotation says; the name of a choice becomes the choice.

    Hydra does so for a run. A config that a program makes must not pass for another one: a string is never *the*
    member of an Enum, so that each comparison with it would quietly be false.
    """
    for name, kind in get_type_hints(type(config)).items():
        setattr(config, name, _typed(getattr(config, name), kind, f"{group}.{name}"))


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
        return [_typed(each, item, f"{key}[{place}]") for place, each in enumerate(value)]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _member(value, kind, key)
    if kind in PLAIN_TYPES:
        wanted, right = PLAIN_TYPES[kind]
        # to Python, True is a number too
        fits = isinstance(value, wanted) and isinstance(value, bool) == (kind is bool)
        require(fits, key, repr(value) if isinstance(value, str) else value, right)
    return value


def _member(value: Any, kind: type[Enum], key: str) -> Enum:
    if isinstance(value, kind):
        return value
    found = kind.__members__.get(value) if isinstance(value, str) else None
    if found is None:
        raise ConfigError(f"{key}={value}: must be {one_of(list(kind.__members__))}")
    return found


def one_of(names: Sequence[str]) -> str:
    """ "a, b or c"."""
    return " or ".join([*filter(None, [", ".join(names[:-1])]), names[-1]])


def at_least(minimum: float, **values: float | None) -> None:
    """Each named value (None passes) is a finite number, not below `minimum`; `__` in a name means a dot."""
    for name, value in values.items():
        if value is not None:
            right = f"must be at least {minimum}" + (" and finite" if value == math.inf else "")
            require(minimum <= value < math.inf, name.replace("__", "."), value, right)


def is_share(**values: float) -> None:
    """Each named value is a share: 0 <= value < 1."""
    for name, value in values.items():
        require(0.0 <= value < 1.0, name.replace("__", "."), value, "must be at least 0 and below 1")


def would_do(whole: int, value: int) -> str:
    """The numbers nearest to `value` that divide `whole`, as it does not: "2 or 4" for 3 and 8."""
    below = next((number for number in range(min(value - 1, whole), 0, -1) if whole % number == 0), None)
    above = next((number for number in range(value + 1, whole + 1) if whole % number == 0), None)
    return " or ".join(str(number) for number in (below, above) if number is not None)
