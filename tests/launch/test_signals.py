"""launcher=local under signals at any moment: the job ends with a documented status, and leaves no rank."""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
from support.forks import fork_context
from torch.distributed.elastic.multiprocessing import ProcessFailure

from reformer_dist.config import LauncherConfig
from reformer_dist.launch import local
from reformer_dist.process.exit_status import KILLED, PREEMPTED
from reformer_dist.process.signals import SIGNALS, exit_on_signal

pytestmark = pytest.mark.jobs

PATHS = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
BOUND = 60  # seconds; a job takes about one
WORK = 0.5  # seconds that a rank works
KILL_RANK, KILL_LAUNCHER = "kill a rank", "kill the launcher"
TWICE = [(first, second) for first in SIGNALS[:3] for second in SIGNALS[:3]]
EVENTS: list[tuple[signal.Signals | str, ...]] = [
    *((signum,) for signum in (*SIGNALS, signal.SIGQUIT)),
    *TWICE,
    (KILL_RANK,),
    (KILL_LAUNCHER,),
    (KILL_RANK, signal.SIGTERM),
    (KILL_RANK, signal.SIGQUIT),
    (KILL_RANK, KILL_LAUNCHER),
]


def launch(folder: str, fate: str) -> None:
    """A command that runs two ranks."""
    os.setsid()
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    exit_on_signal()
    os.environ["PYTHONPATH"] = PATHS
    (Path(folder) / "started").touch()
    launcher = LauncherConfig(nproc_per_node=2, max_restarts=1)
    os._exit(local.run_ranks("obedient_rank", [folder, fate, fate], launcher, "begin again"))


def start(folder: Path, fate: str) -> BaseProcess:
    launcher = fork_context().Process(target=launch, args=(str(folder), fate))
    launcher.start()
    wait_for(folder, "started")
    return launcher


def wait_for(folder: Path, pattern: str, count: int = 1) -> None:
    deadline = time.monotonic() + BOUND
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.005)


def ranks(folder: Path) -> list[psutil.Process]:
    """All processes that have the folder among their arguments, however they were started."""
    return [each for each in psutil.process_iter(["cmdline"]) if str(folder) in (each.info["cmdline"] or [])]


def send(event: signal.Signals | str, launcher: BaseProcess, folder: Path, draw: random.Random) -> None:
    if event == KILL_RANK:
        if victims := ranks(folder):
            draw.choice(victims).kill()
    elif event == KILL_LAUNCHER:
        launcher.kill()
    elif launcher.exitcode is None:
        assert launcher.pid is not None
        os.kill(launcher.pid, event)


def check_end(launcher: BaseProcess, folder: Path, events: tuple[signal.Signals | str, ...]) -> int | None:
    """Waits for the end of the job; fails if it hangs, leaves ranks or has a status that nothing explains."""
    launcher.join(BOUND)
    status = launcher.exitcode
    survivors = psutil.wait_procs(ranks(folder), timeout=BOUND if KILL_LAUNCHER in events else 0)[1]
    for each in [*survivors, *([psutil.Process(launcher.pid)] if status is None else [])]:
        each.kill()
    assert status is not None, "hangs"
    assert survivors == []
    # a signal may come after the work is done, and a killed rank is started again
    allowed = {0}
    if set(events) & set(SIGNALS):
        allowed.add(PREEMPTED)
    if signal.SIGQUIT in events:
        allowed.add(KILLED + signal.SIGQUIT)
    if KILL_LAUNCHER in events:
        allowed.add(-signal.SIGKILL)
    if (
        signal.SIGINT in events and len(events) > 1
    ):  # Python handles pending signals by number: either is the second
        allowed.add(KILLED + signal.SIGINT)
    assert status in allowed
    return status


def test_a_signal_while_ranks_start_reaches_them(tmp_path: Path) -> None:
    """The agent makes a new list of workers when it starts them: the first has no process ids, ever."""
    launcher = start(tmp_path, "work=60")
    assert launcher.pid is not None
    os.kill(launcher.pid, signal.SIGTERM)
    assert check_end(launcher, tmp_path, (signal.SIGTERM,)) == PREEMPTED


def test_a_signal_while_ranks_restart_ends_the_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    launcher = start(tmp_path, "work=60")
    wait_for(tmp_path, "rank*.json", 2)
    ranks(tmp_path)[0].kill()
    wait_for(tmp_path, "saved*")  # the other one is ended before all are started again
    assert launcher.pid is not None
    os.kill(launcher.pid, signal.SIGUSR1)
    assert check_end(launcher, tmp_path, (KILL_RANK, signal.SIGUSR1)) == PREEMPTED
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("seed", range(3))
def test_signals_at_random_moments(tmp_path: Path, seed: int) -> None:
    disturb(tmp_path, seed, EVENTS[seed * 7 % len(EVENTS)])


@pytest.mark.slow
@pytest.mark.parametrize("events", EVENTS, ids=lambda events: "+".join(map(str, events)))
@pytest.mark.parametrize("seed", range(3))
def test_all_signals_at_many_random_moments(
    tmp_path: Path, seed: int, events: tuple[signal.Signals | str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    disturb(tmp_path, seed, events)
    said = capfd.readouterr().err
    assert "Traceback" not in said, said


def disturb(folder: Path, seed: int, events: tuple[signal.Signals | str, ...]) -> None:
    """Sends the events to a job at moments from its start to shortly after its end."""
    draw = random.Random(f"{seed} {events}")
    launcher = start(folder, f"work={WORK}")
    # a job whose rank is killed starts twice
    time.sleep(draw.uniform(0, 4 * WORK))
    for number, event in enumerate(events):
        time.sleep(number * draw.choice([0, 0.01, WORK, 3 * WORK]))
        send(event, launcher, folder, draw)
    check_end(launcher, folder, events)


def test_a_killed_rank_is_the_cause_of_others_that_end_in_the_same_second() -> None:
    job = local._Job(("python",), 3, local._Forwarder())
    ended = {rank: ProcessFailure(rank, 1, code, "") for rank, code in enumerate([1, -signal.SIGKILL, 1])}
    for failure in ended.values():
        failure.timestamp = 7
    assert job._status(ended) == KILLED + signal.SIGKILL
    assert job.killed_rank == "rank 1 of 3 was killed by SIGKILL"
    ended[1].timestamp = 8  # by the agent, since it did not end
    assert job._status(ended) == 1
