"""The driver of a sweep: starts trials as resources become free, monitors them and records their results."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from reformer_dist.process.exit_status import KILLED, PREEMPTED
from reformer_dist.process.log import logger
from reformer_dist.process.signals import SIGNALS, handling
from reformer_dist.sweep.placement import Placement
from reformer_dist.sweep.process import TrialProcess, open_lock
from reformer_dist.sweep.trial_metrics import MetricsRow, read_metrics
from reformer_dist.sweep.trials import ENDED, SweepFile, Trial, TrialStatus

POLL_INTERVAL = 0.2  # seconds
METRICS_INTERVAL = 2.0  # seconds between reads of a running trial's metrics
SAVE_TIMEOUT = 600.0  # seconds that stopped trials have for their last save before they are killed


class SearchStrategy(Protocol):
    """Proposes trials and receives their results."""

    def describe(self) -> str:
        """The number of trials, for the log."""
        ...

    def next_trial(self) -> Trial | None:
        """The next trial to start; None if there is none, now or at all."""
        ...

    def should_prune(self, trial: Trial, rows: list[MetricsRow]) -> bool:
        """Whether to stop a running trial early, given its metrics so far."""
        ...

    def trial_ended(self, trial: Trial) -> None:
        """Records the final status of a trial."""
        ...


Command = Callable[[Trial], list[str]]


@dataclass
class _RunningTrial:
    trial: Trial
    process: TrialProcess
    placement: Placement
    initial_step: int
    pending: list[Command]
    """Commands to run in the same placement after the current one succeeds."""
    n_rows: int = 0
    """Rows of metrics read so far."""
    last_read: float = 0.0


class Driver:
    """Runs the trials of one strategy. Stays in one thread: a trial is signalled when its parent thread ends."""

    def __init__(
        self,
        file: SweepFile,
        placements: list[Placement],
        commands: list[Command],
        summarize: Callable[[Trial], None],
    ) -> None:
        """commands: Python arguments of a trial's processes, run in order. summarize: sets `trial.result`."""
        self._file, self._free, self._commands, self._summarize = file, list(placements), commands, summarize
        self._running: list[_RunningTrial] = []
        self._blocked: list[Trial] = []
        self._signal: int | None = None
        self._n_signals = 0

    def run(self, strategy: SearchStrategy) -> int | None:
        """Runs until the strategy has no more trials; returns the signal that stopped it early, if any."""
        with handling(SIGNALS, self._on_signal):
            while True:
                if self._signal is not None:
                    self._stop_all(strategy)
                    return self._signal
                self._start_trials(strategy)
                if not self._running and not self._blocked:
                    return None
                time.sleep(POLL_INTERVAL)
                self._poll(strategy)

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        self._signal, self._n_signals = self._signal or signum, self._n_signals + 1

    def _trial_folder(self, trial: Trial) -> Path:
        return self._file.folder / trial.name

    def _start_trials(self, strategy: SearchStrategy) -> None:
        """Starts trials while placements are free."""
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
        """Starts a trial; returns False if a process of an earlier driver still runs in its folder."""
        folder = self._trial_folder(trial)
        folder.mkdir(parents=True, exist_ok=True)
        lock = open_lock(folder)
        if lock is None:
            if trial.reason == "":
                trial.reason = "waiting for the process of an earlier driver to end"
                logger.info(f"{trial.name}: {trial.reason}")
            return False
        verb = "resumed" if trial.starts else "started"
        trial.starts, trial.state, trial.reason = trial.starts + 1, TrialStatus.running, ""
        self._file.save()  # before the process starts, so that every trial folder is listed in the file
        placement = self._free.pop()
        step = _last_step(read_metrics(folder))
        first, *pending = self._commands
        process = TrialProcess(first(trial), folder, placement, lock)
        self._running.append(_RunningTrial(trial, process, placement, step, pending))
        logger.info(f"{trial.name}: {verb}, {process.log}")
        return True

    def _poll(self, strategy: SearchStrategy) -> None:
        for running in list(self._running):
            status = running.process.status()
            if status is not None:
                self._process_ended(running, status, strategy)
            elif time.monotonic() - running.last_read > METRICS_INTERVAL:
                running.last_read = time.monotonic()
                self._maybe_prune(running, strategy)

    def _maybe_prune(self, running: _RunningTrial, strategy: SearchStrategy) -> None:
        trial = running.trial
        is_training = len(running.pending) == len(self._commands) - 1
        if trial.state is TrialStatus.pruned or not is_training:
            return
        rows = read_metrics(self._trial_folder(trial))
        if len(rows) > running.n_rows:
            running.n_rows = len(rows)
            if strategy.should_prune(trial, rows):
                trial.state = TrialStatus.pruned
                running.process.stop()

    def _process_ended(self, running: _RunningTrial, status: int, strategy: SearchStrategy) -> None:
        """Starts the trial's next command, or records how the trial ended."""
        trial = running.trial
        if status == 0 and running.pending and self._signal is None:
            self._start_next_command(running)
            return
        self._running.remove(running)
        self._free.append(running.placement)
        step = _last_step(read_metrics(self._trial_folder(trial)))
        if status == 0 and not running.pending:
            trial.state = TrialStatus.finished
        elif trial.state is TrialStatus.pruned:
            trial.reason = f"at step {step}"
        elif self._signal is not None:
            trial.state, trial.reason = TrialStatus.interrupted, f"at step {step}"
        elif status == PREEMPTED and step > running.initial_step:
            trial.state, trial.reason = TrialStatus.interrupted, f"preempted at step {step}"
        else:
            trial.state, trial.reason = TrialStatus.failed, _failure_reason(status, running.process)
        if trial.state in ENDED:
            self._summarize(trial)
        elif self._signal is None:
            self._blocked.append(trial)  # resumes when a placement is free
        self._file.save()
        if trial.state in ENDED:
            strategy.trial_ended(trial)
        logger.info(f"{trial.name}: {_outcome(trial, running.process.log)}")

    def _start_next_command(self, running: _RunningTrial) -> None:
        """Starts the next command of a trial; if the last process still holds the lock, the next poll retries."""
        folder = self._trial_folder(running.trial)
        lock = open_lock(folder)
        if lock is not None:
            command = running.pending.pop(0)
            running.process = TrialProcess(command(running.trial), folder, running.placement, lock)

    def _stop_all(self, strategy: SearchStrategy) -> None:
        """Stops every trial after a save; a second signal or the timeout kills them."""
        if self._running:
            names = ", ".join(running.trial.name for running in self._running)
            logger.info(f"stopping {names} after a save; run the same command again to resume")
        for running in self._running:
            running.process.stop()
        deadline, n_signals = time.monotonic() + SAVE_TIMEOUT, self._n_signals
        while self._running:
            if self._n_signals > n_signals or time.monotonic() > deadline:
                deadline, n_signals = time.monotonic() + SAVE_TIMEOUT, self._n_signals
                for running in self._running:
                    running.process.kill()
            for running in list(self._running):
                status = running.process.status()
                if status is not None:
                    self._process_ended(running, status, strategy)
            time.sleep(POLL_INTERVAL / 4)


def _last_step(rows: list[MetricsRow]) -> int:
    return int(rows[-1]["step"]) if rows else 0


def _failure_reason(status: int, process: TrialProcess) -> str:
    error = process.last_error()
    name = {KILLED + signum: signum.name for signum in signal.Signals}.get(status)
    return error if name is None or name in error else f"killed by {name}"


def _outcome(trial: Trial, log: Path) -> str:
    text = trial.state.value + (f": {trial.reason}" if trial.reason else "")
    if trial.state is TrialStatus.failed:
        return f"{text} ({log})"
    results = ", ".join(f"{tag} {value:,.4g}" for tag, value in trial.result.items())
    return f"{text}{': ' if results else ''}{results}"
