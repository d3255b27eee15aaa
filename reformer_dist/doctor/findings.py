"""Results of the checks: ok, warning or failed, one line each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class CheckState(Enum):
    ok = "ok"
    warning = "warning"
    failed = "failed"


@dataclass(frozen=True)
class Finding:
    name: str
    state: CheckState
    message: str
    """What was measured, with units."""
    advice: str = ""
    """How to fix it; empty if it is ok."""

    def line(self) -> str:
        advice = f"\n{'':10}-> {self.advice}" if self.advice else ""
        return f"{self.state.value:<10}{self.name}: {self.message}{advice}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"state": self.state.value}


def ok(name: str, message: str) -> Finding:
    return Finding(name, CheckState.ok, message)


def warning(name: str, message: str, advice: str) -> Finding:
    return Finding(name, CheckState.warning, message, advice)


def failed(name: str, message: str, advice: str) -> Finding:
    return Finding(name, CheckState.failed, message, advice)


def run_check(name: str, check: Callable[[], Iterable[Finding]], advice: str) -> list[Finding]:
    """The findings of a check; a check that raises has failed."""
    try:
        return list(check())
    except Exception as error:  # would break a run as well
        return [failed(name, f"{type(error).__name__}: {error}", advice)]
