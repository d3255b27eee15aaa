"""TensorBoardWriter: event files that survive a full disk, written by rank 0."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reformer_dist.fs.append import AppendFile

_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\.")
VERSION = "brain.Event:2"  # of the first event of a file


class TensorBoardWriter:
    """Writes scalars and texts by step.

    PyTorch's SummaryWriter stops for good when its thread gets an error from a full disk.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{_begin_time(folder):.9f}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendFile(folder / name)
        self._add(file_version=VERSION)
        # makes readers drop what an interrupted run wrote after its checkpoint
        self._add(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, values: Mapping[str, float], step: int, seconds: float = 0.0) -> None:
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            self._add(step=step, summary=scalar(name, value))

    def text(self, name: str, text: str, step: int) -> None:
        from torch.utils.tensorboard.summary import text as text_summary

        indented = "".join(f"    {line}\n" for line in text.splitlines())  # a code block in Markdown
        self._add(step=step, summary=text_summary(name, indented))

    def histogram(self, name: str, values: NDArray[np.float64], step: int) -> None:
        from torch.utils.tensorboard.summary import histogram

        self._add(step=step, summary=histogram(name, values, bins="auto"))

    def end_step(self) -> None:
        """Nothing: each value is written at once."""

    def flush(self) -> None:
        """Syncs everything to disk. Raises OSError if that fails."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def _add(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        RecordWriter(self._file).write(Event(wall_time=time.time(), **event).SerializeToString())


def _begin_time(folder: Path) -> float:
    """Now, or a second after the latest event file if the clock has gone back: readers order the files by name."""
    found = [_NAME.match(path.name) for path in folder.iterdir()]
    return max([time.time(), *(int(match[1]) + 1.0 for match in found if match)])


def write_hparams(folder: Path, values: dict[str, float | str | bool], metrics: dict[str, float]) -> None:
    """Writes a run's hyperparameters and final metrics for TensorBoard's HPARAMS page."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    # separate tags, so that the curves are not touched
    named = {f"result/{tag}": value for tag, value in metrics.items()}
    with SummaryWriter(str(folder)) as writer:
        assert writer.file_writer is not None
        for summary in hparams(values, named):
            writer.file_writer.add_summary(summary)
        for tag, value in named.items():
            writer.add_scalar(tag, value)
