"""A run that receives a stop signal saves, exits with status 75, and resumes as if it had not been stopped."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_helpers import LOSS, checkpoint, losses, train, when_told
from support.threads import on_ranks
from support.tiny import tiny_overrides
from support.weights import assert_same

from reformer_dist.checkpoint import async_save
from reformer_dist.distributed.runtime import Preempted, Runtime, SharedError
from reformer_dist.errors import DataError
from reformer_dist.process.exit_status import INTERRUPTED, PREEMPTED
from reformer_dist.training.batches import BatchReader
from reformer_dist.training.preemption import StopSignal

# the stop interrupts a metrics window, and evaluation is due
LONG = ("trainer.max_steps=12", "trainer.log_every=4", "trainer.eval_every=4", "trainer.save_every=100")
LONG += ("optim.schedule=constant",)
ENDLESS = "trainer.max_steps=1000000"


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, job: Runtime) -> Path:
    return train(job, tiny_data, tmp_path_factory.mktemp("runs") / "uncut", *LONG)


class StopAt(StopSignal):
    """Set when it is checked for the n-th time."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    @property
    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks <= 0


LOOKS = [pytest.param(looks, marks=[] if looks % 2 else pytest.mark.slow) for looks in range(1, 32, 3)]


@pytest.mark.parametrize("looks", LOOKS)
def test_a_stop_anywhere_loses_nothing(
    uncut: Path, tiny_data: Path, tmp_path: Path, job: Runtime, looks: int
) -> None:
    """Before the first step, while waiting for data, between steps, during an evaluation."""
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
        stop.defer_to_steps()
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        BatchReader(job, None, Silent(), stop=stop).next_step()  # type: ignore[arg-type]
    waiting = [thread for thread in threading.enumerate() if thread.name == "batch-reader"]
    assert waiting and all(thread.daemon for thread in waiting)  # so that the process can end
    stopped.set()


def tell(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def test_a_signal_while_the_run_is_built_or_saved(
    uncut: Path,
    tiny_data: Path,
    tmp_path: Path,
    job: Runtime,
    said: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped during a save, then, after a restart, before the checkpoint is read."""
    save = async_save.save_file

    def save_when_told(*args: object) -> None:
        monkeypatch.setattr(async_save, "save_file", save)
        os.kill(os.getpid(), signal.SIGTERM)
        while not stop.is_set:
            time.sleep(0.01)
        save(*args)

    def train_until_told(words: str) -> None:
        with stop.listen(), pytest.raises(Preempted, match=f"^stopped by a signal: {words}"):
            stop.defer_to_steps()
            train(job, tiny_data, tmp_path, *LONG, "trainer.save_every=4", stop=stop)

    stop = StopSignal()
    monkeypatch.setattr(async_save, "save_file", save_when_told)
    train_until_told("saved step|no step since the checkpoint of step 4")
    assert [words for words in said.messages if words.startswith("saved ")]
    step = max(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir())
    stop = StopSignal()
    with when_told(resuming_from=tell(signal.SIGTERM)):
        train_until_told(f"no step since the checkpoint of step {step}$")
    train(job, tiny_data, tmp_path, *LONG)
    assert losses(tmp_path) == losses(uncut)
    assert_same(checkpoint(tmp_path, 12), checkpoint(uncut, 12))


IMPATIENT = """
import os, signal, time
from reformer_dist.training import preemption
stop = preemption.StopSignal()
with stop.listen():
    stop.defer_to_steps()
    preemption.REPEAT_SECONDS = 1e9
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    print("waits", stop.is_set, flush=True)
    preemption.REPEAT_SECONDS = 0
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""


def test_what_one_rank_cannot_read_ends_all_alike() -> None:
    """Held-out text of one rank is damaged: no rank may wait for it."""

    def things(rank: int) -> Iterator[int]:
        yield 1
        if rank == 1:
            raise DataError("a sample is damaged")
        yield 2

    def of_rank(runtime: Runtime) -> list[int]:
        return list(StopSignal().until_stopped(things(runtime.rank), runtime))

    errors = on_ranks(3, of_rank)
    assert [type(error) for error in errors] == [SharedError] * 3
    assert {str(error) for error in errors} == {"rank 1: a sample is damaged"}
    assert on_ranks(1, of_rank) == [[1, 2]]


@pytest.mark.jobs
def test_a_second_sigint_leaves_at_once() -> None:
    """Unless it repeats the first, which a terminal and a launcher both send."""
    done = subprocess.run([sys.executable, "-c", IMPATIENT], stdout=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (INTERRUPTED, "waits True\n")


@pytest.mark.parametrize(("module", "name"), [("torch._C", "SIGINT"), ("deepspeed.comm", "SIGTERM")])
@pytest.mark.jobs
def test_a_signal_while_modules_are_loaded(tiny_data: Path, tmp_path: Path, module: str, name: str) -> None:
    """Imports take seconds, during which a signal must end the process with the status of a stop."""
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "reformer_dist.train",
        *tiny_overrides(tiny_data, tmp_path, ENDLESS),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("import time:") and line.split("|")[-1].strip() == module:
                process.send_signal(signal.Signals[name])
                break
        _, complaints = process.communicate(timeout=300)
    assert process.returncode == PREEMPTED
    assert "Traceback" not in complaints


@pytest.mark.jobs
def test_a_run_whose_terminal_closes_saves(tiny_data: Path, tmp_path: Path) -> None:
    """It receives SIGHUP; that its last output has no reader must not be an error."""
    terminal, far = pty.openpty()

    def own_the_terminal() -> None:
        os.setsid()
        fcntl.ioctl(far, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-m", "reformer_dist.train", *tiny_overrides(tiny_data, tmp_path, *LONG, ENDLESS)]
    ends = {"stdin": far, "stdout": far, "stderr": far}
    process = subprocess.Popen(command, **ends, preexec_fn=own_the_terminal)
    try:
        os.close(far)
        said = b""
        while b" 4/1000000 | loss" not in said:  # as lines: this terminal has no width
            said += os.read(terminal, 4096)
        os.close(terminal)
        assert process.wait(60) == PREEMPTED
    finally:
        process.kill()
        process.wait()
    [saved] = (tmp_path / "checkpoints").iterdir()
    assert int(saved.name[5:]) >= 4


@pytest.mark.jobs
def test_under_nohup_a_run_outlives_its_terminal(tiny_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reformer_dist.train", *tiny_overrides(tiny_data, tmp_path, *LONG, ENDLESS)]
    with subprocess.Popen(["nohup", *command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for signum, step in ((signal.SIGHUP, 4), (signal.SIGUSR1, 40)):  # the second as SLURM may
            assert any(f" {step}/1000000 | loss" in line for line in process.stdout)
            process.send_signal(signum)
        stopped = re.search(r"stopped by a signal: saved step (\d+)", process.stdout.read())
        assert process.wait(60) == PREEMPTED
    assert stopped is not None and int(stopped[1]) >= 40


@pytest.mark.jobs
def test_a_rank_that_is_told_stops_all(uncut: Path, tiny_data: Path, tmp_path: Path, job: Runtime) -> None:
    """From the command line: one of two ranks receives the signal after step 4. One rank then resumes."""
    ranks = ("launcher=local", "launcher.nproc_per_node=2")
    overrides = tiny_overrides(tiny_data, tmp_path, *LONG, ENDLESS, *ranks)
    command = [sys.executable, "-u", "-m", "reformer_dist.train", *overrides]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if " 4/1000000 | loss" in line:
                children = psutil.Process(process.pid).children()
                [second] = [child for child in children if child.environ().get("RANK") == "1"]
                second.send_signal(signal.SIGUSR2)
                break
        said = process.stdout.read()
        assert process.wait(60) == PREEMPTED, said
    stopped = re.search(r"stopped by a signal: saved step (\d+)", said)
    assert stopped is not None, said
    last = 4 * (int(stopped[1]) // 4 + 1)
    train(job, tiny_data, tmp_path, *LONG, f"trainer.max_steps={last}")
    found, right = losses(tmp_path), losses(uncut)
    assert list(found) == list(range(4, last + 1, 4))
    for step in found.keys() & right.keys():
        assert found[step][LOSS] == pytest.approx(right[step][LOSS], rel=1e-5)
