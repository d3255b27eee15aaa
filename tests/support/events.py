"""What a run wrote for TensorBoard."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_events(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def scalars(run: Path, tag: str) -> dict[int, float]:
    """Values of a tag by step; each step stands there once."""
    events = read_events(run).Scalars(tag)
    values = {event.step: event.value for event in events}
    assert [event.step for event in events] == sorted(values)
    return values
