"""The plan of a search: Optuna proposes trials, and stops those that fall behind. Its study lies on the disk."""

from __future__ import annotations

import fcntl
import math
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from reformer_dist.errors import ConfigError
from reformer_dist.process.log import logger
from reformer_dist.seeds import derive_seed
from reformer_dist.sweep.metrics import MetricsRow, series
from reformer_dist.sweep.request import SweepRequest
from reformer_dist.sweep.space import Choices, Interval
from reformer_dist.sweep.state import DONE, TrialStatus, SweepFile, Trial, read_all

JOURNAL = "study.journal"
MIN_TO_COMPARE = 4  # finished trials that the median takes
RETRY_OF = "retry_of"

Describe = Callable[[str, dict[str, str]], Trial]


class OptunaSearch:
    """Trials are `trial-0000` and so on, by their number in the study."""

    def __init__(self, request: SweepRequest, file: SweepFile, describe: Describe) -> None:
        """describe: a new trial of a name and its changed keys. Raises ConfigError."""
        self._optuna = _import_optuna()
        self._settings, self._file, self._describe = request.settings, file, describe
        self._space = request.space
        self._storage, self._study = self._open_study(request)
        self._waiting = deque(self._left_over(request))
        if self._settings.retry_failed:
            self._enqueue_failed()

    def describe(self) -> str:
        return f"a study of {self._settings.n_trials} trials, {self._counted() - len(self._waiting)} done"

    def next(self) -> Trial | None:
        if self._waiting:
            return self._waiting.popleft()
        while self._has_retries() or self._counted() < self._settings.n_trials:
            trial = self._make(self._study.ask())
            self._file.trials[trial.name] = trial
            if trial.state is not TrialStatus.failed:
                return trial
            logger.info(f"{trial.name}: failed: {trial.reason}")
            self._file.save()
            self.ended(trial)
        return None

    def should_prune(self, trial: Trial, rows: list[MetricsRow]) -> bool:
        if self._settings.prune_after is None:
            return False
        identity, known = self._identity(trial), self._frozen(trial).intermediate_values
        for step, value in series(rows, self._settings.objective):
            if step not in known:
                self._storage.set_trial_intermediate_value(identity, step, value)
        frozen = self._frozen(trial)
        return bool(frozen.intermediate_values) and bool(self._study.pruner.prune(self._study, frozen))

    def ended(self, trial: Trial) -> None:
        state = self._optuna.trial.TrialState
        value = trial.result.get(self._settings.objective, math.nan)
        number = _number(trial)
        if trial.state is TrialStatus.finished and math.isfinite(value):
            self._study.tell(number, value, skip_if_finished=True)
            return
        if trial.state is TrialStatus.finished:
            trial.state, trial.reason = TrialStatus.failed, f"it wrote no {self._settings.objective}"
            self._file.save()
        if not self._frozen(trial).state.is_finished():
            self._storage.set_trial_user_attr(self._identity(trial), "reason", trial.reason)
        ending = state.PRUNED if trial.state is TrialStatus.pruned else state.FAIL
        self._study.tell(number, state=ending, skip_if_finished=True)

    def _open_study(self, request: SweepRequest) -> tuple[Any, Any]:
        optuna, settings = self._optuna, self._settings
        path = request.folder / JOURNAL
        backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=_Lock(path.with_suffix(".lock")))
        storage = optuna.storages.JournalStorage(backend)
        study = optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True, direction="minimize")
        asked = {"overrides": " ".join(sorted(_lasting(request.fixed))), "space": str(request.space)}
        for key, value in asked.items():
            before = study.user_attrs.get(key, value)
            if before != value:
                right = f"holds a study whose {key} are {before}; choose another output_dir for {value}"
                raise ConfigError(f"output_dir={request.folder}: {right}")
            study.set_user_attr(key, value)
        # a sampler begun anew with the same seed would propose the same points again
        seed = derive_seed("sweep", settings.seed, settings.share()[0], len(study.trials)) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        warm_up = settings.prune_after or 0
        study.pruner = optuna.pruners.MedianPruner(n_startup_trials=MIN_TO_COMPARE, n_warmup_steps=warm_up)
        return storage, study

    def _left_over(self, request: SweepRequest) -> list[Trial]:
        """Trials that earlier drivers of this share have begun and not ended; those that have ended are told."""
        alone = self._settings.share()[1] == 1
        known = read_all(request.folder) if alone else self._file.trials
        self._file.trials |= known
        left = []
        for frozen in self._study.get_trials(states=[self._optuna.trial.TrialState.RUNNING]):
            trial = known.get(_name(frozen.number))
            if trial is not None and trial.state in DONE:
                self.ended(trial)
            elif trial is not None or alone:
                trial = trial or self._make(self._optuna.trial.Trial(self._study, frozen._trial_id))
                self._file.trials[trial.name] = trial
                left.append(trial)
        return left

    def _make(self, proposed: Any) -> Trial:
        """A trial of what Optuna proposes; what it has proposed before of the same trial, it repeats."""
        name = _name(proposed.number)
        changed = {key: _propose(proposed, key, dimension) for key, dimension in self._space.items()}
        try:
            return self._describe(name, changed)
        except ConfigError as error:
            return Trial(name, changed, TrialStatus.failed, reason=str(error))

    def _enqueue_failed(self) -> None:
        trials = self._study.trials
        retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        for trial in trials:
            if trial.state is self._optuna.trial.TrialState.FAIL and trial.number not in retried:
                self._study.enqueue_trial(trial.params, user_attrs={RETRY_OF: trial.number})

    def _counted(self) -> int:
        """Trials so far; one that is tried again counts once."""
        return sum(RETRY_OF not in trial.user_attrs for trial in self._study.get_trials(deepcopy=False))

    def _has_retries(self) -> bool:
        return bool(self._study.get_trials(deepcopy=False, states=[self._optuna.trial.TrialState.WAITING]))

    def _identity(self, trial: Trial) -> int:
        """Of the trial in the storage."""
        identity: int = self._frozen(trial)._trial_id
        return identity

    def _frozen(self, trial: Trial) -> Any:
        return self._study.get_trials(deepcopy=False)[_number(trial)]


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("sweep=optuna: Optuna is missing; pip install 'reformer_dist[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Optuna 4 has constant_liar, and warns of it
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def _propose(trial: Any, key: str, dimension: Choices | Interval) -> str:
    """Optuna's value of a key, as it stands in an override."""
    if isinstance(dimension, Choices):
        return str(trial.suggest_categorical(key, dimension.values))
    low, high, is_log = dimension.low, dimension.high, dimension.is_log
    step = None if is_log else dimension.step
    if dimension.is_integer:
        return dimension.word(trial.suggest_int(key, int(low), int(high), step=int(step or 1), log=is_log))
    return dimension.word(trial.suggest_float(key, low, high, step=step, log=is_log))


class _Lock:
    """Of the journal, as Optuna asks for; its own, a file that is there, would outlive a killed driver."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def acquire(self) -> bool:
        self._file = self._path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        assert self._file is not None
        self._file.close()


def _lasting(fixed: list[str]) -> list[str]:
    """Without what changes no result."""
    return [word for word in fixed if not word.lstrip("+").startswith(("launcher", "output_dir="))]


def _name(number: int) -> str:
    return f"trial-{number:04d}"


def _number(trial: Trial) -> int:
    return int(trial.name.removeprefix("trial-"))
