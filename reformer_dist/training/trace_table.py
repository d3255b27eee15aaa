"""Where the time of a step goes, by part: from a trace of `torch.profiler` in Chrome's format.

The parts are marked by `ops.profiling.part`. An operation of autograd's backward belongs to the part of the
forward operation that it differentiates. On a CPU, the time of the thread that trains is divided among the
parts. On a GPU, it is the time of the device, divided among the parts that launched its kernels: where kernels
overlap, that of the exchange is not counted, and where the device has nothing to do, it waits for the data or
for the host.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from reformer_dist.ops.profiling import PARTS, PREFIX, STEP

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of events
LAUNCHES = ("cuda_runtime", "cuda_driver")
IDLE, OTHER = "idle", "other"
ORDER = (*PARTS, IDLE, OTHER)
MEANINGS = {**PARTS, IDLE: "the GPU waits for the host", OTHER: "between the parts"}
Event = dict[str, Any]


class Interval(NamedTuple):
    """A named time span in microseconds."""

    start: float
    end: float
    name: str


@dataclass(frozen=True)
class TimeTable:
    """Milliseconds of each part, as means over some steps."""

    parts: dict[str, float]
    measured: float
    """Milliseconds of a step by the clock of the trainer."""
    n_steps: int

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        steps = "1 step" if self.n_steps == 1 else f"{self.n_steps} steps"
        lines = [f"{'part':<14}{'ms/step':>10}{'':>8}  mean over {steps}"]
        for name in sorted(self.parts, key=ORDER.index):
            share = self.parts[name] / self.total if self.total else 0.0
            lines.append(f"{name:<14}{self.parts[name]:>10.2f}{share:>8.1%}  {MEANINGS[name]}")
        return "\n".join([*lines, f"{'sum':<14}{self.total:>10.2f}{'':>8}  of {self.measured:.2f} ms measured"])


class Timeline:
    """The innermost of nested intervals at each time, on one thread."""

    def __init__(self, intervals: Iterable[Interval]) -> None:
        self._times: list[float] = []
        self._names: list[str | None] = []
        active: list[Interval] = []
        for interval in sorted(intervals, key=lambda each: (each.start, -each.end)):
            self._leave(active, interval.start)
            active.append(interval)
            self._add(interval.start, interval.name)
        self._leave(active, float("inf"))

    def at(self, time: float) -> str | None:
        index = bisect_right(self._times, time)
        return self._names[index - 1] if index else None

    def within(self, start: float, end: float) -> Iterator[tuple[str | None, float]]:
        """The names between two times, with the microseconds of each."""
        index = bisect_right(self._times, start)
        while start < end:
            until = min(end, self._times[index]) if index < len(self._times) else end
            yield (self._names[index - 1] if index else None), until - start
            start, index = until, index + 1

    def _leave(self, active: list[Interval], time: float) -> None:
        while active and active[-1].end <= time:
            end = active.pop().end
            self._add(end, active[-1].name if active else None)

    def _add(self, time: float, name: str | None) -> None:
        self._times.append(time)
        self._names.append(name)


def time_by_part(events: Sequence[Event], measured: Sequence[float]) -> TimeTable:
    """The table of a trace of some steps. measured: seconds of each step.

    Raises ValueError if the trace has another number of steps.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    marks = [event for event in spans if _is_mark(event)]
    steps = [_interval(event) for event in marks if event["name"] == f"{PREFIX}{STEP}"]
    if len(steps) != len(measured):
        raise ValueError(f"the trace has {len(steps)} steps, but {len(measured)} were measured")
    timelines = _timelines(events, spans, marks)
    main = timelines[next(event["tid"] for event in marks if event["name"] == f"{PREFIX}{STEP}")]
    kernels = _kernels(spans, timelines)
    totals: Counter[str] = Counter()
    for step in steps:
        used = _device_time(kernels, step, main) if kernels else main.within(step.start, step.end)
        for name, time in used:
            totals[OTHER if name in (None, STEP) else str(name)] += time  # type: ignore[assignment]
    n_steps = len(measured)
    parts = {name: time / 1000 / n_steps for name, time in totals.items()}
    return TimeTable(parts, 1000 * sum(measured) / n_steps, n_steps)


def _is_mark(event: Event) -> bool:
    return event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)


def _interval(event: Event, name: str | None = None) -> Interval:
    named = event["name"].removeprefix(PREFIX) if name is None else name
    return Interval(event["ts"], event["ts"] + event["dur"], named)


def _timelines(events: Sequence[Event], spans: Sequence[Event], marks: Sequence[Event]) -> dict[Any, Timeline]:
    """The parts on each thread, with the operations of the backward."""
    marked: dict[Any, list[Interval]] = {}
    for event in marks:
        marked.setdefault(event["tid"], []).append(_interval(event))
    forward = {thread: Timeline(intervals) for thread, intervals in marked.items()}
    links = [event for event in events if event.get("cat") == "fwdbwd"]
    sources = {event["id"]: event for event in links if event["ph"] == "s"}
    operations = {(event["tid"], event["ts"]): event for event in spans if event.get("cat") == "cpu_op"}
    for link in links:
        operation, source = operations.get((link["tid"], link["ts"])), sources.get(link["id"])
        if link["ph"] == "f" and operation is not None and source is not None:
            timeline = forward.get(source["tid"])
            part = timeline.at(source["ts"]) if timeline else None
            if part in PARTS and part not in ("forward", "backward"):
                marked.setdefault(link["tid"], []).append(_interval(operation, part))
    return {thread: Timeline(intervals) for thread, intervals in marked.items()}


def _kernels(spans: Sequence[Event], timelines: Mapping[Any, Timeline]) -> list[Interval]:
    """What the device did, by the part that launched it."""
    launches = {
        event["args"]["correlation"]: event
        for event in spans
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    kernels = []
    for event in spans:
        if event.get("cat") in DEVICE_WORK:
            launch = launches.get(event.get("args", {}).get("correlation"))
            timeline = timelines.get(launch["tid"]) if launch else None
            part = timeline.at(launch["ts"]) if launch and timeline else None
            kernels.append(_interval(event, part if part in PARTS else OTHER))
    return kernels


def _device_time(kernels: Sequence[Interval], step: Interval, main: Timeline) -> Iterator[tuple[str, float]]:
    """Who uses the device during a step, with the microseconds of each."""
    changes = sorted(
        (time, sign, kernel.name)
        for kernel in kernels
        if kernel.start < step.end and kernel.end > step.start
        for time, sign in ((max(kernel.start, step.start), 1), (min(kernel.end, step.end), -1))
    )
    running: Counter[str] = Counter()
    time = step.start
    for until, sign, name in [*changes, (step.end, 0, "")]:
        if until > time:
            if +running:
                # what overlaps with the exchange would run without it too
                yield min(+running, key=lambda each: (each == "exchange", ORDER.index(each))), until - time
            else:
                for doing, waited in main.within(time, until):
                    yield ("data" if doing == "data" else IDLE), waited
        time = max(time, until)
        if sign:
            running[name] += sign
