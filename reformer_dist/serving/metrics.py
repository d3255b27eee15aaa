"""Counters of the server, in the text format of Prometheus."""

from __future__ import annotations

import threading
from collections import Counter

TIME_BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # seconds
HELP = {
    "requests_total": "requests by path and status",
    "texts_total": "texts by what ended them",
    "prompt_tokens_total": "tokens of prompts read",
    "completion_tokens_total": "tokens generated",
    "prefix_hits_total": "prompts whose cached_prefix was found",
    "prefix_misses_total": "prompts whose cached_prefix was read",
    "streams": "texts being generated",
    "waiting": "texts that wait for a stream",
    "state_bytes": "memory of the decoding states",
    "prefix_bytes": "memory of the prefix cache",
    "first_token_seconds": "time from a request to the first token of its texts",
}
GAUGES = ("streams", "waiting", "state_bytes", "prefix_bytes")


class Metrics:
    """Thread-safe counters, gauges and one histogram."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Counter[tuple[str, str]] = Counter()
        self._first_token: Counter[float] = Counter()
        self._seconds = 0.0

    def count(self, name: str, n: int = 1, **labels: str) -> None:
        with self._lock:
            self._values[name, _labels(labels)] += n

    def set(self, name: str, value: int) -> None:
        with self._lock:
            self._values[name, ""] = value

    def add_first_token(self, seconds: float) -> None:
        with self._lock:
            self._seconds += seconds
            self._first_token[next((bound for bound in TIME_BOUNDS if seconds <= bound), float("inf"))] += 1

    def render(self) -> str:
        """The exposition of all metrics."""
        with self._lock:
            values, first_token, seconds = dict(self._values), dict(self._first_token), self._seconds
        lines = []
        for name, help_text in HELP.items():
            full = f"reformer_{name}"
            kind = "gauge" if name in GAUGES else "counter" if name.endswith("_total") else "histogram"
            lines += [f"# HELP {full} {help_text}", f"# TYPE {full} {kind}"]
            if kind == "histogram":
                lines += _histogram(full, first_token, seconds)
                continue
            found = {labels: value for (of, labels), value in values.items() if of == name}
            if not found and name not in ("requests_total", "texts_total"):
                found = {"": 0}
            lines += [f"{full}{labels} {value}" for labels, value in sorted(found.items())]
        return "\n".join(lines) + "\n"


def _histogram(name: str, counts: dict[float, int], seconds: float) -> list[str]:
    total, lines = 0, []
    for bound in (*TIME_BOUNDS, float("inf")):
        total += counts.get(bound, 0)
        shown = "+Inf" if bound == float("inf") else f"{bound:g}"
        lines.append(f'{name}_bucket{{le="{shown}"}} {total}')
    return [*lines, f"{name}_sum {seconds:.6f}", f"{name}_count {total}"]


def _labels(labels: dict[str, str]) -> str:
    """As they are printed. The values are paths of routes, statuses and names of ours."""
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}" if labels else ""
