"""What an examination says: a line each, ok, warning or failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class State(Enum):
    ok = "ok"
    warning = "warning"
    failed = "failed"


@dataclass(frozen=True)
class Finding:
    name: str
    state: State
    words: str
    """What was found, with its units."""
    advice: str = ""
    """What to do; empty where all is well."""

    def line(self) -> str:
        advice = f"\n{'':10}-> {self.advice}" if self.advice else ""
        return f"{self.state.value:<10}{self.name}: {self.words}{advice}"

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"state": self.state.value}


def ok(name: str, words: str) -> Finding:
    return Finding(name, State.ok, words)


def warning(name: str, words: str, advice: str) -> Finding:
    return Finding(name, State.warning, words, advice)


def failed(name: str, words: str, advice: str) -> Finding:
    return Finding(name, State.failed, words, advice)


def examine(name: str, examination: Callable[[], Iterable[Finding]], advice: str) -> list[Finding]:
    """The findings of an examination; one that breaks has failed."""
    try:
        return list(examination())
    except Exception as error:  # whatever breaks here would break a run
        return [failed(name, f"{type(error).__name__}: {error}", advice)]
