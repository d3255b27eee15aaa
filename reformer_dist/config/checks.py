"""The few checks that every group uses; each message names the key, the value and what would be right."""

from __future__ import annotations

import math

from reformer_dist.errors import ConfigError


def require(condition: bool, key: str, value: object, right: str) -> None:
    """Raise ConfigError "key=value: right" unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}={value}: {right}")


def at_least(minimum: float, **values: float | None) -> None:
    """Each named value (None passes) is a number that is not below `minimum`; `__` in a name means a dot."""
    for name, value in values.items():
        if value is not None:
            fine = not math.isnan(value) and value >= minimum
            require(fine, name.replace("__", "."), value, f"must be at least {minimum}")


def is_share(**values: float) -> None:
    """Each named value is a share: 0 <= value < 1."""
    for name, value in values.items():
        require(0.0 <= value < 1.0, name.replace("__", "."), value, "must be at least 0 and below 1")


def would_do(whole: int, value: int) -> str:
    """The numbers nearest to `value` that divide `whole`, as it does not: "2 or 4" for 3 and 8."""
    below = next((number for number in range(min(value - 1, whole), 0, -1) if whole % number == 0), None)
    above = next((number for number in range(value + 1, whole + 1) if whole % number == 0), None)
    return " or ".join(str(number) for number in (below, above) if number is not None)
