"""BestTracker: the best value of a held-out metric so far, and whether the run ends for want of a better."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from reformer_dist.config import TrainerConfig
from reformer_dist.errors import ConfigError
from reformer_dist.process.log import logger
from reformer_dist.training.checkpoint_manager import BestValue, TrainState


class BestTracker:
    """Follows trainer.keep_best; does nothing without it. All of its memory is in the TrainState."""

    def __init__(self, config: TrainerConfig, state: TrainState, metrics: Collection[str]) -> None:
        """metrics: names of those that an evaluation measures. Raises ConfigError if keep_best is not."""
        self._config, self._state, self._metric = config, state, config.keep_best
        self._is_unsaved = self._is_saving = False
        self._before: BestValue | None = None  # the best value before the unsaved one
        if self._metric is not None and self._metric not in metrics:
            found = ", ".join(sorted(metrics))
            raise ConfigError(f"trainer.keep_best={self._metric}: the evaluation of this task measures {found}")
        if state.best is not None and state.best["metric"] != self._metric:
            state.best, state.evaluations_since_best = None, 0

    def begin_stage(self) -> None:
        """Forgets the values so far: held-out rows of another length, or other windows, are another measure."""
        self._state.best, self._state.evaluations_since_best = None, 0
        self._before, self._is_unsaved = None, False

    def end_evaluation(self, values: Mapping[str, float]) -> bool:
        """Judges the weights after the last step by their metrics; returns whether they are the best so far.

        A repeated evaluation of the same step changes nothing.
        """
        state = self._state
        if self._metric is None or state.judged_step == state.step:
            return False
        state.judged_step = state.step
        value, best = values[self._metric], state.best
        if not self._is_better(value):
            state.evaluations_since_best += 1
            return False
        logger.info(f"step {state.step} | best {self._metric} so far: {value:.4f}")
        state.best, state.evaluations_since_best = BestValue(metric=self._metric, value=value, step=state.step), 0
        self._before, self._is_unsaved = best, True
        return True

    def _is_better(self, value: float) -> bool:
        """nan never is."""
        if self._state.best is None:
            return value == value
        sign = 1.0 if self._config.higher_is_better else -1.0
        return sign * value > sign * self._state.best["value"]

    def begin_save(self) -> None:
        """Before a save of the weights after the last step, when no other is in progress."""
        self._is_saving, self._is_unsaved = self._is_unsaved, False

    def end_save(self, *, has_failed: bool) -> None:
        """After a save: if it failed, its weights are lost, and the best ones before them count again."""
        if self._is_saving and has_failed:
            self._state.best = self._before
        self._is_saving = False

    @property
    def should_stop(self) -> bool:
        """Whether trainer.patience is used up."""
        return 0 < self._config.patience <= self._state.evaluations_since_best

    def describe(self) -> str:
        """Why the run ends."""
        best, n = self._state.best, self._state.evaluations_since_best
        found = "none was finite" if best is None else f"the best is {best['value']:.4f}, of step {best['step']}"
        return (
            f"trainer.patience={self._config.patience}: {n} evaluations without a better {self._metric}; {found}"
        )
