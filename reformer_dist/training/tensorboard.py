"""TensorBoard, written by rank 0 alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Board:
    """Scalars and texts by step; on ranks other than 0 it does nothing."""

    def __init__(self, folder: Path, *, is_active: bool, first_step: int) -> None:
        self._writer: SummaryWriter | None = None
        if is_active:
            from torch.utils.tensorboard import SummaryWriter

            # what an interrupted run wrote beyond its checkpoint is taken back
            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        if self._writer is not None:
            indented = "".join(f"    {line}\n" for line in text.splitlines())  # Markdown for "as it is"
            self._writer.add_text(name, indented, step)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


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
