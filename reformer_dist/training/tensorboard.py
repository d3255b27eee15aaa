"""TensorBoard, written by rank 0 alone."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from reformer_dist.fs.append import PatientFile

VERSION = "brain.Event:2"  # what a file of events begins with


class TensorBoardWriter:
    """Scalars and texts by step; on ranks other than 0 it does nothing.

    PyTorch's SummaryWriter gives up for good where its thread meets a full disk.
    """

    def __init__(self, folder: Path, *, is_active: bool, first_step: int) -> None:
        self._file: PatientFile | None = None
        if is_active:
            from tensorboard.compat.proto.event_pb2 import SessionLog

            folder.mkdir(parents=True, exist_ok=True)
            # readers take the files in the order of their names
            name = f"events.out.tfevents.{time.time():.9f}.{socket.gethostname()}.{os.getpid()}"
            self._file = PatientFile(folder / name)
            self._add(file_version=VERSION)
            # what an interrupted run wrote beyond its checkpoint is taken back
            self._add(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self._file is not None:
            from torch.utils.tensorboard.summary import scalar

            for name, value in values.items():
                self._add(step=step, summary=scalar(name, value))

    def text(self, name: str, text: str, step: int) -> None:
        if self._file is not None:
            from torch.utils.tensorboard.summary import text as summary_of

            indented = "".join(f"    {line}\n" for line in text.splitlines())  # Markdown for "as it is"
            self._add(step=step, summary=summary_of(name, indented))

    def flush(self) -> None:
        """All is on the disk. Raises OSError where it can't be."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _add(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        RecordWriter(self._file).write(Event(wall_time=time.time(), **event).SerializeToString())


def write_hparams(folder: Path, values: dict[str, float | str | bool], metrics: dict[str, float]) -> None:
    """A line of TensorBoard's page HPARAMS: what a run was given, and what came of it."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    # tags of their own: the curves keep theirs
    named = {f"result/{tag}": value for tag, value in metrics.items()}
    with SummaryWriter(str(folder)) as writer:
        assert writer.file_writer is not None
        for summary in hparams(values, named):
            writer.file_writer.add_summary(summary)
        for tag, value in named.items():
            writer.add_scalar(tag, value)
