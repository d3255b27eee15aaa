"""Optuna search: proposes trials and prunes bad ones. The study is stored on disk."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from reformer_dist.errors import ConfigError
from reformer_dist.fs.lock import locked
from reformer_dist.process.log import logger
from reformer_dist.seeds import derive_seed
from reformer_dist.sweep.request import SweepRequest
from reformer_dist.sweep.space import Choices, Interval
from reformer_dist.sweep.trial_metrics import MetricsRow, series
from reformer_dist.sweep.trials import ENDED, SweepFile, Trial, TrialStatus, read_all

JOURNAL = "study.journal"
N_STARTUP_TRIALS = 4  # finished trials before pruning starts
RETRY_OF = "retry_of"

MakeTrial = Callable[[str, dict[str, str]], Trial]


class OptunaSearch:
    """Trials are named `trial-0000` and so on by their number in the study."""

    def __init__(self, request: SweepRequest, file: SweepFile, make_trial: MakeTrial) -> None:
        """make_trial: creates a trial from a name and its overrides; raises ConfigError if it is invalid."""
        self._optuna = _import_optuna()
        self._settings, self._file, self._make_trial = request.settings, file, make_trial
        self._space = request.space
        self._storage, self._study = self._open_study(request)
        self._waiting = deque(self._unfinished(request))
        if self._settings.retry_failed:
            self._enqueue_failed()

    def describe(self) -> str:
        return f"a study of {self._settings.n_trials} trials, {self._n_trials() - len(self._waiting)} ended"

    def next_trial(self) -> Trial | None:
        if self._waiting:
            return self._waiting.popleft()
        waiting = [self._optuna.trial.TrialState.WAITING]
        while self._study.get_trials(deepcopy=False, states=waiting) or self._n_trials() < self._settings.n_trials:
            trial = self._from_proposal(self._study.ask())
            self._file.trials[trial.name] = trial
            if trial.state is not TrialStatus.failed:
                return trial
            logger.info(f"{trial.name}: failed: {trial.reason}")
            self._file.save()
            self.trial_ended(trial)
        return None

    def should_prune(self, trial: Trial, rows: list[MetricsRow]) -> bool:
        if self._settings.prune_after is None:
            return False
        frozen = self._frozen(trial)
        for step, value in series(rows, self._settings.objective):
            if step not in frozen.intermediate_values:
                self._storage.set_trial_intermediate_value(frozen._trial_id, step, value)
        frozen = self._frozen(trial)
        return bool(frozen.intermediate_values) and bool(self._study.pruner.prune(self._study, frozen))

    def trial_ended(self, trial: Trial) -> None:
        states = self._optuna.trial.TrialState
        value = trial.result.get(self._settings.objective, math.nan)
        number = _number(trial)
        if trial.state is TrialStatus.finished and math.isfinite(value):
            self._study.tell(number, value, skip_if_finished=True)
            return
        if trial.state is TrialStatus.finished:
            trial.state, trial.reason = TrialStatus.failed, f"no {self._settings.objective} in its metrics"
            self._file.save()
        if not self._frozen(trial).state.is_finished():
            self._storage.set_trial_user_attr(self._frozen(trial)._trial_id, "reason", trial.reason)
        outcome = states.PRUNED if trial.state is TrialStatus.pruned else states.FAIL
        self._study.tell(number, state=outcome, skip_if_finished=True)

    def _open_study(self, request: SweepRequest) -> tuple[Any, Any]:
        optuna, settings = self._optuna, self._settings
        path = request.folder / JOURNAL
        backend = optuna.storages.journal.JournalFileBackend(
            str(path), lock_obj=_JournalLock(path.with_suffix(".lock"))
        )
        storage = optuna.storages.JournalStorage(backend)
        direction = "maximize" if settings.maximizes else "minimize"
        study = optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True, direction=direction)
        # launcher and output_dir do not affect the results
        excluded = ("launcher", "output_dir=")
        overrides = sorted(word for word in request.fixed if not word.lstrip("+").startswith(excluded))
        attributes = {"overrides": " ".join(overrides), "space": str(request.space)}
        attributes |= {"objective": settings.objective, "direction": direction}
        for key, value in attributes.items():
            # studies of earlier versions have no such attributes, and minimize
            first = study.direction.name.lower() if key == "direction" else value
            stored = study.user_attrs.get(key, first)
            if stored != value:
                problem = f"contains a study with {key} {stored}; choose another output_dir for {value}"
                raise ConfigError(f"output_dir={request.folder}: {problem}")
            study.set_user_attr(key, value)
        # a restarted sampler with the same seed would propose the same points again
        seed = derive_seed("sweep", settings.seed, settings.parse_shard()[0], len(study.trials)) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        warm_up = settings.prune_after or 0
        study.pruner = optuna.pruners.MedianPruner(n_startup_trials=N_STARTUP_TRIALS, n_warmup_steps=warm_up)
        return storage, study

    def _unfinished(self, request: SweepRequest) -> list[Trial]:
        """Unfinished trials of earlier drivers of this shard; reports those that have ended to the study."""
        is_only_shard = self._settings.parse_shard()[1] == 1
        known = read_all(request.folder) if is_only_shard else self._file.trials
        self._file.trials |= known
        unfinished = []
        for frozen in self._study.get_trials(states=[self._optuna.trial.TrialState.RUNNING]):
            trial = known.get(_name(frozen.number))
            if trial is not None and trial.state in ENDED:
                self.trial_ended(trial)
            elif trial is not None or is_only_shard:
                trial = trial or self._from_proposal(self._optuna.trial.Trial(self._study, frozen._trial_id))
                self._file.trials[trial.name] = trial
                unfinished.append(trial)
        return unfinished

    def _from_proposal(self, proposed: Any) -> Trial:
        """A trial with the values that Optuna proposes; values already proposed for it are repeated."""
        name = _name(proposed.number)
        changed = {key: _propose(proposed, key, dimension) for key, dimension in self._space.items()}
        try:
            return self._make_trial(name, changed)
        except ConfigError as error:
            return Trial(name, changed, TrialStatus.failed, reason=str(error))

    def _enqueue_failed(self) -> None:
        trials = self._study.trials
        retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        for trial in trials:
            if trial.state is self._optuna.trial.TrialState.FAIL and trial.number not in retried:
                self._study.enqueue_trial(trial.params, user_attrs={RETRY_OF: trial.number})

    def _n_trials(self) -> int:
        """Number of trials so far; a retried trial counts once."""
        return sum(RETRY_OF not in trial.user_attrs for trial in self._study.get_trials(deepcopy=False))

    def _frozen(self, trial: Trial) -> Any:
        """Optuna's record of a trial, as of now."""
        return self._study.get_trials(deepcopy=False)[_number(trial)]


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("sweep=optuna: Optuna is not installed; pip install 'reformer_dist[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Optuna 4 warns that constant_liar is experimental
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def _propose(trial: Any, key: str, dimension: Choices | Interval) -> str:
    """Optuna's value of a key, in the syntax of an override."""
    if isinstance(dimension, Choices):
        return str(trial.suggest_categorical(key, dimension.values))
    low, high, is_log = dimension.low, dimension.high, dimension.is_log
    step = None if is_log else dimension.step
    if dimension.is_integer:
        return dimension.format(trial.suggest_int(key, int(low), int(high), step=int(step or 1), log=is_log))
    return dimension.format(trial.suggest_float(key, low, high, step=step, log=is_log))


class _JournalLock:
    """Lock of the journal, with Optuna's interface. Optuna's own lock files would outlive a killed driver."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()

    def acquire(self) -> bool:
        self._stack.enter_context(locked(self._path))
        return True

    def release(self) -> None:
        self._stack.close()


def _name(number: int) -> str:
    return f"trial-{number:04d}"


def _number(trial: Trial) -> int:
    return int(trial.name.removeprefix("trial-"))
