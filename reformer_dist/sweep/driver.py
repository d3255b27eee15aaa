"""The driver: keeps the places busy with trials, watches them, and writes down what became of each."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

from reformer_dist.process.log import logger
from reformer_dist.sweep.metrics import MetricsRow, read_metrics
from reformer_dist.sweep.placement import Placement
from reformer_dist.sweep.process import KILLED, PREEMPTED, TrialProcess, open_lock
from reformer_dist.sweep.state import DONE, TrialStatus, SweepFile, Trial

TICK = 0.2  # seconds
LOOK_EVERY = 2.0  # seconds between looks into the metrics of running trials
PATIENCE = 600.0  # seconds that trials have for their last save before they are killed
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SearchStrategy(Protocol):
    """Which trials there are, and what to make of them."""

    def describe(self) -> str:
        """How much there is to do, in words."""
        ...

    def next(self) -> Trial | None:
        """A trial to start, or None while, or because, there is none."""
        ...

    def should_prune(self, trial: Trial, rows: list[MetricsRow]) -> bool:
        """Whether a running trial, by what it has written, should be stopped."""
        ...

    def ended(self, trial: Trial) -> None:
        """Takes note of the state in which a trial ended."""
        ...


Command = Callable[[Trial], list[str]]


@dataclass
class _Running:
    trial: Trial
    process: TrialProcess
    place: Placement
    steps_before: int
    after: list[Command]
    """What else is to run in the trial's place once it has succeeded."""
    rows: list[MetricsRow] = field(default_factory=list)
    looked: float = 0.0


class Driver:
    """Runs the trials of one plan; a single thread, so that children die with it and with nothing else."""

    def __init__(
        self, file: SweepFile, places: list[Placement], commands: list[Command], summarise: Callable[[Trial], None]
    ) -> None:
        """commands: arguments of python for a trial, one after the other; summarise: fills in its result."""
        self._file, self._free, self._commands, self._summarise = file, list(places), commands, summarise
        self._running: list[_Running] = []
        self._blocked: list[Trial] = []
        self._signal: int | None = None
        self._signals = 0

    def run(self, plan: SearchStrategy) -> int | None:
        """Runs the plan to its end; returns the signal that cut it, if one did."""
        with self._catching_signals():
            while True:
                if self._signal is not None:
                    self._stop_all(plan)
                    return self._signal
                self._fill(plan)
                if not self._running and not self._blocked:
                    return None
                time.sleep(TICK)
                self._look(plan)

    def _folder(self, trial: Trial) -> Path:
        return self._file.folder / trial.name

    def _fill(self, plan: SearchStrategy) -> None:
        """Starts trials while there is a place for one."""
        retried, self._blocked = self._blocked, []
        while self._free:
            trial = retried.pop(0) if retried else strategy.next_trial()
            if trial is None:
                break
            if not self._start(trial):
                self._blocked.append(trial)
                if not retried:
                    break
        self._blocked += retried

    def _start(self, trial: Trial) -> bool:
        """False while a process of an earlier driver is at work in the trial's folder."""
        folder = self._folder(trial)
        folder.mkdir(parents=True, exist_ok=True)
        lock = open_lock(folder)
        if lock is None:
            if trial.reason == "":
                logger.info(f"{trial.name}: waits for the process of an earlier driver to end")
                trial.reason = "waits for the process of an earlier driver"
            return False
        verb = "goes on" if trial.starts else "starts"
        trial.starts, trial.state, trial.reason = trial.starts + 1, TrialStatus.running, ""
        self._file.save()  # first: whoever finds the folder finds it named
        place = self._free.pop()
        steps = _steps(read_metrics(folder))
        first, *after = self._commands
        process = TrialProcess(first(trial), folder, place, lock)
        self._running.append(_Running(trial, process, place, steps, after))
        logger.info(f"{trial.name}: {verb}, {process.log}")
        return True

    def _look(self, plan: SearchStrategy) -> None:
        for running in list(self._running):
            status = running.process.status()
            if status is not None:
                self._end(running, status, plan)
            elif time.monotonic() - running.looked > LOOK_EVERY:
                running.looked = time.monotonic()
                self._judge(running, plan)

    def _judge(self, running: _Running, plan: SearchStrategy) -> None:
        trial = running.trial
        if trial.state is TrialStatus.pruned or len(running.after) < len(self._commands) - 1:
            return
        rows = read_metrics(self._folder(trial))
        if len(rows) > len(running.rows):
            running.rows = rows
            if plan.should_prune(trial, rows):
                trial.state = TrialStatus.pruned
                running.process.stop()

    def _end(self, running: _Running, status: int, plan: SearchStrategy) -> None:
        trial, folder = running.trial, self._folder(running.trial)
        if status == 0 and running.after and self._signal is None:
            self._go_on(running)
            return
        self._running.remove(running)
        self._free.append(running.place)
        rows = read_metrics(folder)
        if status == 0 and not running.after:
            trial.state = TrialStatus.finished
        elif trial.state is TrialStatus.pruned:
            trial.reason = f"at step {_steps(rows)}"
        elif self._signal is not None:
            trial.state, trial.reason = TrialStatus.cut, f"at step {_steps(rows)}"
        elif status == PREEMPTED and _steps(rows) > running.steps_before:
            trial.state, trial.reason = TrialStatus.cut, f"preempted at step {_steps(rows)}"
        else:
            trial.state, trial.reason = TrialStatus.failed, _why(status, running.process)
        if trial.state in DONE:
            self._summarise(trial)
        elif self._signal is None:
            self._blocked.append(trial)  # it goes on when there is a place
        self._file.save()
        if trial.state in DONE:
            strategy.trial_ended(trial)
        logger.info(f"{trial.name}: {_said(trial, running.process.log)}")

    def _go_on(self, running: _Running) -> None:
        """Starts the next command of a trial; a later look tries again where the last one holds the lock yet."""
        folder = self._folder(running.trial)
        lock = open_lock(folder)
        if lock is not None:
            command = running.after.pop(0)
            running.process = TrialProcess(command(running.trial), folder, running.place, lock)

    def _stop_all(self, plan: SearchStrategy) -> None:
        """Lets every trial save and end; a second signal, or too long a time, kills."""
        if self._running:
            names = ", ".join(running.trial.name for running in self._running)
            logger.info(f"stopping {names}: each saves and ends; the same command goes on with them")
        for running in self._running:
            running.process.stop()
        deadline, signals = time.monotonic() + PATIENCE, self._signals
        while self._running:
            if self._signals > signals or time.monotonic() > deadline:
                deadline, signals = time.monotonic() + PATIENCE, self._signals
                for running in self._running:
                    running.process.kill()
            for running in list(self._running):
                status = running.process.status()
                if status is not None:
                    self._end(running, status, plan)
            time.sleep(TICK / 4)

    @contextmanager
    def _catching_signals(self) -> Iterator[None]:
        def note(signum: int, _: FrameType | None) -> None:
            self._signal, self._signals = self._signal or signum, self._signals + 1

        # under nohup, SIGHUP stays ignored
        heard = [signum for signum in STOPPING if signal.getsignal(signum) is not signal.SIG_IGN]
        before = {signum: signal.signal(signum, note) for signum in heard}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def _steps(rows: list[MetricsRow]) -> int:
    return int(rows[-1]["step"]) if rows else 0


def _why(status: int, process: TrialProcess) -> str:
    words = process.last_words()
    names = {KILLED + each: each.name for each in signal.Signals}
    name = names.get(status)
    return words if name is None or name in words else f"killed by {name}"


def _said(trial: Trial, log: Path) -> str:
    words = trial.state.value + (f": {trial.reason}" if trial.reason else "")
    if trial.state is TrialStatus.failed:
        return f"{words} ({log})"
    numbers = ", ".join(f"{tag} {value:,.4g}" for tag, value in trial.result.items())
    return f"{words}{': ' if numbers else ''}{numbers}"
