"""DivergenceMonitor: detects that a run diverges, keeps its good checkpoints, and says how to continue from them.

A checkpoint is good if the step after it has a finite gradient and a loss that is not worse than that of guessing.
While steps are skipped nothing is saved, and only good checkpoints replace good ones.
"""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from reformer_dist.checkpoint import CheckpointReader
from reformer_dist.config import Precision, RunConfig
from reformer_dist.distributed.runtime import Runtime, SharedError
from reformer_dist.engine import StepResult
from reformer_dist.errors import TrainingError, UserError
from reformer_dist.process.invocation import repeat_with
from reformer_dist.process.log import logger
from reformer_dist.training.checkpoint_manager import CheckpointManager, TrainState

WARN_AFTER_STEPS = 100  # with a loss worse than guessing


class Diverged(SharedError, TrainingError):
    """The run can't continue as it is; raised on every rank."""


class DivergenceMonitor:
    """Judges each step of a run. Every rank makes the same calls in the same order."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        checkpoints: CheckpointManager,
        state: TrainState,
        guessing_loss: float,
    ) -> None:
        """guessing_loss: of a uniform guess, in nats per label; infinite if there is no such bound."""
        self._config, self._runtime, self._checkpoints, self._state = config, runtime, checkpoints, state
        self._guessing_loss = guessing_loss
        self._last_better_step = state.step
        self._has_warned = False
        self._n_unchanged = 0  # steps since the weights have changed
        self.is_broken = False
        """Whether the last step was skipped, or the evaluation after it is not finite: nothing must be saved."""

    def end_step(self, loss_sum: Tensor, n_labels: float, result: StepResult) -> None:
        """Judges the weights from which the step started.

        loss_sum: in nats, of this rank. n_labels: of all ranks. Raises Diverged after trainer.max_skipped_steps
        skipped steps in a row.
        """
        state = self._state
        if result.was_skipped:
            state.skipped += 1
            state.skipped_in_a_row += 1
        if not result.was_skipped or result.was_rejected:
            self.is_broken = False
            self._prove(loss_sum, n_labels)
            if result.was_rejected:
                self.pass_over()
                self._stop_if_too_many("were spikes, or had a non-finite loss or gradient")
            else:
                state.skipped_in_a_row = 0
            return
        # in fp16, a gradient that overflows lowers the loss scale: a normal event if the loss is finite
        [n_broken] = self._runtime.sum([float(not loss_sum.isfinite())])
        self.is_broken = n_broken > 0 or self._config.trainer.precision is not Precision.fp16
        logger.warning(f"step {state.step}: loss or gradient is not finite; the step is skipped")
        self._stop_if_too_many("had a non-finite loss or gradient")

    def pass_over(self) -> None:
        """The step leaves the weights as they were, and judges nothing."""
        self._n_unchanged += 1

    def _prove(self, loss_sum: Tensor, n_labels: float) -> None:
        """The weights from which the step started gave finite numbers: so are those of their checkpoint."""
        last = self._state.step - 1
        for step in range(last - self._n_unchanged, last + 1):
            if self._checkpoints.awaits_proof(step):
                loss = self._runtime.sum([float(loss_sum)])[0] / n_labels
                self._checkpoints.prove(step, is_good=loss <= self._guessing_loss)
        self._n_unchanged = 0

    def _stop_if_too_many(self, what: str) -> None:
        limit = self._config.trainer.max_skipped_steps
        if self._state.skipped_in_a_row >= limit:
            self.stop(f"trainer.max_skipped_steps={limit}: this many steps in a row {what}")

    def end_evaluation(self, loss: float) -> None:
        """loss: held-out, of the weights after the last step."""
        self.is_broken = self.is_broken or not math.isfinite(loss)

    def end_run(self) -> None:
        """Accepts the weights after the last step, which no other step will judge."""
        self._checkpoints.prove(self._state.step, is_good=not self._state.is_worse_than_guessing)

    def log_loss(self, loss: float) -> None:
        """Compares the loss of the steps since the last call, in nats per label, with that of guessing.

        Raises Diverged after trainer.max_diverged_steps steps since the warm-up in which it stayed above.
        """
        state, limit, guessing = self._state, self._config.trainer.max_diverged_steps, self._guessing_loss
        if math.isnan(loss):  # all steps were skipped
            return
        state.is_worse_than_guessing = loss > guessing
        if not state.is_worse_than_guessing or state.step <= self._config.optim.warmup_steps:
            self._last_better_step, self._has_warned = state.step, False
            return
        n_steps = state.step - self._last_better_step
        found = f"the loss has been above {guessing:.3f}, that of guessing, for {n_steps} steps"
        if 0 < limit <= n_steps:
            self.stop(f"trainer.max_diverged_steps={limit}: {found}")
        if n_steps >= WARN_AFTER_STEPS and not self._has_warned:
            self._has_warned = True
            logger.warning(f"step {state.step}: {found}; checkpoints from before are kept")

    def stop(self, reason: str) -> NoReturn:
        """Raises Diverged with the newest good checkpoint and a command that continues from it."""
        with suppress(UserError):  # whose save failed is none to continue from
            self._checkpoints.wait()
        raise Diverged(f"{reason}; {self._runtime.on_main(self._advise)}")

    def _advise(self) -> str:
        good, is_newest = self._checkpoints.newest_good()
        if good is None:
            fix = repeat_with({"optim.lr": f"{self._config.optim.lr / 10:g}", **self._elsewhere(is_newest)})
            return f"no good checkpoint is left; to start again with a lower optim.lr: {fix}"
        changes = {"optim.lr": f"{self._lower_rate(good):g}"}
        if not is_newest:
            changes |= {"resume": str(good), **self._elsewhere(is_newest, f"-from-{good.name}")}
        elif self._config.resume == "never":
            changes |= {"resume": "auto"}
        fix = repeat_with(changes)
        return f"the newest good checkpoint is {good}; to continue from it with a lower optim.lr: {fix}"

    def _elsewhere(self, is_empty: bool, suffix: str = "-again") -> dict[str, str]:
        """Another output_dir, unless this one holds no checkpoint that the new run would resume from."""
        return {} if is_empty else {"output_dir": f"{self._config.output_dir.rstrip('/')}{suffix}"}

    def _lower_rate(self, good: Path) -> float:
        """optim.lr of the checkpoint if it was lower, otherwise a tenth of the current one."""
        saved, current = CheckpointReader(good).record.config["optim"]["lr"], self._config.optim.lr
        return saved if saved < current else current / 10
