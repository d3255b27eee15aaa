"""WandbTracker: sends metrics to Weights & Biases, or writes its files for `wandb sync`."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from reformer_dist.config import TrackerConfig, TrackerKind
from reformer_dist.errors import UserError
from reformer_dist.process.log import logger
from reformer_dist.training.tracker import RowTracker, RunDescription, SavedRun, TrackedStep

SERVICE = "wandb-core"  # its process, which writes and sends
SERVICE_SECONDS = 60.0  # for that of a killed run to end
BLOCK, HEADER, FIRST_HEADER = 32768, 7, 7
FULL, LAST = 1, 4  # kinds of fragments that end a record


class WandbTracker(RowTracker):
    kind = TrackerKind.wandb

    def __init__(self, config: TrackerConfig, run: RunDescription) -> None:
        """Raises UserError if wandb refuses to start."""
        super().__init__()
        import wandb

        saved = SavedRun(run.folder, self.kind)
        earlier = saved.read()
        run_id = str(earlier.get("run_id") or uuid.uuid4().hex[:8])
        _wait_for_service(earlier.get("service"))
        try:
            self._run = wandb.init(
                project=config.project,
                name=run.name,
                id=run_id,
                resume="allow",
                dir=str(run.folder),
                config=run.config,
                allow_val_change=True,
                mode="offline" if config.offline else "online",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            fix = "`wandb login`, or tracker.offline=true"
            raise UserError(f"tracker=wandb: {str(error).splitlines()[0]}; {fix}") from error
        saved.write(run_id=run_id, service=_service_of_this_process())
        # a server knows the last step; what was written offline is in the files
        self._last_stored = self._run.starting_step - 1
        self._last_stored = max([self._last_stored, *stored_steps(run.folder, run_id)])
        where = f"{run.folder / 'wandb'}; `wandb sync` sends it" if config.offline else self._run.url
        logger.info(f"tracker=wandb: run {run_id} in {where}")

    def _send(self, step: TrackedStep) -> None:
        import wandb

        if step.step <= self._last_stored:
            return
        shown: dict[str, Any] = dict(step.scalars)
        shown |= {name: wandb.Html(f"<pre>{_escaped(text)}</pre>") for name, text in step.texts.items()}
        shown |= {name: wandb.Histogram(values.tolist()) for name, values in step.histograms.items()}
        self._run.log(shown, step=step.step)
        self._last_stored = step.step

    def _finish(self) -> None:
        self._run.finish()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _service_of_this_process() -> int | None:
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if child.name() == SERVICE:
                return child.pid
    return None


def _wait_for_service(pid: object) -> None:
    """Until the service of a killed run has written what it has received."""
    with suppress(psutil.Error):
        if isinstance(pid, int) and psutil.pid_exists(pid) and psutil.Process(pid).name() == SERVICE:
            psutil.Process(pid).wait(SERVICE_SECONDS)


def stored_steps(folder: Path, run_id: str) -> Iterator[int]:
    """The steps in the files that a run has written offline, in all of its starts."""
    for path in sorted(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")):
        yield from (step for step, _ in history(path))


def history(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The steps of a .wandb file, with their values as JSON by tag; without a torn end."""
    from wandb.proto import wandb_internal_pb2

    for content in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.HasField("history"):
            items = record.history.item
            yield record.history.step.num, {"/".join(i.nested_key) or i.key: i.value_json for i in items}


def _records(data: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format: blocks of fragments, each with checksum, length and kind."""
    at, parts = FIRST_HEADER, []
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += HEADER
        if kind == 0 or at + length > len(data):
            return
        parts.append(data[at : at + length])
        at += length
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []
