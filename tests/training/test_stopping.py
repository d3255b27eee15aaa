"""A run that is told to stop saves, ends with status 75, and goes on as if it had not been told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from run_helpers import checkpoint, losses, train
from support.tiny import tiny_overrides
from support.weights import assert_same

from reformer_dist.cli import PREEMPTED
from reformer_dist.distributed.runtime import Preempted, Runtime
from reformer_dist.training.intake import Intake
from reformer_dist.training.stopping import StopSignal

# the window of a report is cut by the stop, and evaluation is due
LONG = ("trainer.max_steps=12", "trainer.log_every=4", "trainer.eval_every=4", "trainer.save_every=100")


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, job: Runtime) -> Path:
    return train(job, tiny_data, tmp_path_factory.mktemp("runs") / "uncut", *LONG)


class StopAt(StopSignal):
    """Set when it is looked at for the n-th time."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    @property
    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks <= 0


@pytest.mark.parametrize("looks", range(1, 32, 3))
def test_a_stop_anywhere_loses_nothing(
    uncut: Path, tiny_data: Path, tmp_path: Path, job: Runtime, looks: int
) -> None:
    """Before the first step, while data is waited for, between steps, in the midst of an evaluation."""
    with pytest.raises(Preempted):
        train(job, tiny_data, tmp_path, *LONG, stop=StopAt(looks))
    train(job, tiny_data, tmp_path, *LONG)
    assert losses(tmp_path) == losses(uncut)
    assert_same(checkpoint(tmp_path, 12), checkpoint(uncut, 12))


def test_a_source_that_never_answers_is_not_waited_for(job: Runtime) -> None:
    class Silent:
        def __next__(self) -> Any:
            stopped.wait(60)

        def __iter__(self) -> Any:
            return self

    stopped = threading.Event()
    stop = StopSignal()
    with stop.listen(), pytest.raises(Preempted):
        stop.wait_for_steps()
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        Intake(job, None, Silent(), stop=stop).next_rows()  # type: ignore[arg-type]
    stopped.set()


@pytest.mark.parametrize(
    ("name", "changed"), [("SIGTERM", []), ("SIGINT", ["launcher=local", "launcher.nproc_per_node=2"])]
)
def test_by_the_command_line(uncut: Path, tiny_data: Path, tmp_path: Path, name: str, changed: list[str]) -> None:
    """The signal comes between steps 4 and 12; with two ranks, it reaches both or one, and both obey."""
    args = [*tiny_overrides(tiny_data, tmp_path, *LONG), *changed]
    command = [sys.executable, "-u", "-m", "reformer_dist.train", *args]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step  4/12 | loss"):
                process.send_signal(signal.Signals[name])
                break
        said = process.stdout.read()
        assert process.wait(60) == PREEMPTED, said
    assert "told to stop: saved step " in said
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, timeout=120, check=True)
    assert "resuming from" in done.stdout
    if not changed:
        assert losses(tmp_path) == losses(uncut)
    assert list(losses(tmp_path)) == list(losses(uncut))
