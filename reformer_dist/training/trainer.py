"""The training loop: `fit` is the order of things, `_train_step` the work of one step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from reformer_dist.config import RunConfig
from reformer_dist.distributed.runtime import Preempted, Runtime, SharedError
from reformer_dist.engine import TrainEngine
from reformer_dist.engine.optim import learning_rate
from reformer_dist.errors import TrainingError, UserError
from reformer_dist.process.log import logger
from reformer_dist.seeds import derive_seed
from reformer_dist.training.batches import BatchReader, Rows
from reformer_dist.training.metrics import Window, bits_per_byte, peak_memory_gib, progress_line
from reformer_dist.training.metrics_log import MetricsLogger
from reformer_dist.training.watchdog import Watchdog


@dataclass
class TrainState:
    """How far a run is: what a checkpoint remembers beside weights and data position."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """Of training: evaluation, samples and checkpoints left out."""
    is_observed: bool = True
    """False where the evaluation or sample of the step was cut short, and has to be made up for."""
    window: dict[str, float] = field(default_factory=dict)
    """Of this rank: the steps since the last report, if the run was cut between two of them."""


class Saver(Protocol):
    """Writes one checkpoint at a time, beside training."""

    def begin(self, progress: TrainState, data_state: dict[str, Any]) -> None:
        """Begins the checkpoint of the step just done; the one before is settled."""
        ...

    def wait(self, *, wait: bool) -> int | None:
        """The step whose checkpoint is whole since this call, if any. Raises UserError where it failed."""
        ...


class Observer(Protocol):
    """Looks at the model beside training; called on every rank with the step just done.

    Raises Preempted alike on every rank if any is told to stop meanwhile.
    """

    def evaluate(self, step: int, seconds: float) -> None: ...

    def sample(self, step: int) -> None: ...


class Trainer:
    """A run on one rank; every rank makes the same calls in the same order."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        engine: TrainEngine,
        intake: BatchReader,
        saver: Saver,
        observer: Observer,
        journal: MetricsLogger,
        progress: TrainState,
        bytes_per_token: float | None,
    ) -> None:
        self.config = config
        self.progress = progress
        self._runtime, self._engine, self._intake = runtime, engine, intake
        self._saver, self._observer, self._journal = saver, observer, journal
        self._bytes_per_token = bytes_per_token
        self._window = Window(runtime.device)
        self._watchdog = Watchdog(runtime, config.trainer.step_timeout)
        self._data_state: dict[str, Any] = {}
        self._failed_saves = 0  # of this process
        self._saved_step = progress.step  # what a stop need not save again

    def fit(self) -> None:
        """Trains up to trainer.max_steps, then evaluates and saves.

        Raises alike on every rank: UserError, and Preempted once it has saved because the job was told to stop.
        """
        if self.progress.step >= self.config.trainer.max_steps and self.progress.is_observed:
            logger.info(
                f"already at step {self.progress.step} of {self.config.trainer.max_steps}: nothing to train"
            )
            return
        self._window.reset()
        if self.progress.window:
            self._window.go_on(self.progress.window)
        try:
            with self._watchdog.watching():
                self._train()
        except Preempted as told:
            raise Preempted(f"{told}: {self._save_before_leaving()}") from None
        except (SharedError, TrainingError):  # alike on every rank
            self._settle(wait=True)
            raise

    def _train(self) -> None:
        if not self.progress.is_observed:
            self._observe()
        while self.progress.step < self.config.trainer.max_steps:
            start = time.perf_counter()
            step = self.progress.step + 1
            with self._watchdog.phase(f"waiting for data of step {step}, or for ranks that do"):
                rows = self._intake.next_rows()
            with self._watchdog.phase(f"computing step {step}"):
                grad_norm, lr = self._train_step(rows)
            self._data_state = rows.state
            self.progress.seconds += time.perf_counter() - start
            if self._is_due(self.config.trainer.log_every):
                self._report(grad_norm, lr)
            end = time.perf_counter()
            self._observe()
            self._journal.end_step()
            if self._is_due(self.config.trainer.save_every):
                with self._watchdog.phase(f"saving after step {step}"):
                    self._save(must=step == self.config.trainer.max_steps)
            else:
                self._settle(wait=False)
            self._window.pause(time.perf_counter() - end)

    def _observe(self) -> None:
        self.progress.is_observed = False
        if self._is_due(self.config.trainer.eval_every):
            with self._watchdog.phase(f"evaluating after step {self.progress.step}"):
                self._observer.evaluate(self.progress.step, self.progress.seconds)
        if self._is_due(self.config.trainer.sample_every):
            self._observer.sample(self.progress.step)
        self.progress.is_observed = True

    def _save_before_leaving(self) -> str:
        """What became of the run, in words."""
        self._settle(wait=True)
        step = self.progress.step
        if step == self._saved_step:
            return f"nothing was done since the checkpoint of step {step}" if step else "before the first step"
        self._save(must=True)
        how = "resume=auto" if self.config.resume == "never" else "the same command"
        return f"saved step {step}; {how} goes on from there"

    def _is_due(self, interval: int) -> bool:
        """Every `interval` steps and at the end; never if it is 0."""
        step = self.progress.step
        return interval > 0 and (step % interval == 0 or step == self.config.trainer.max_steps)

    def _train_step(self, rows: Rows) -> tuple[float, float]:
        """(norm of the gradient, learning rate)."""
        step, device = self.progress.step, self._runtime.device
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for batch in rows.micro_batches:
            loss = self._engine.forward(
                **batch.to(device),
                step=step,
                dropout_seed=derive_seed("dropout", self.config.trainer.seed, step),
                **batch.sequences,
            )
            self._engine.backward(loss, rows.valid_labels)
            loss_sum += loss.detach()
        lr = learning_rate(self.config.optim, step, self.config.trainer.max_steps)
        result = self._engine.step(lr)
        self.progress.step = step + 1
        self._window.add(loss_sum, rows.valid_labels, was_skipped=result.was_skipped)
        self._count_skips(result.was_skipped)
        return result.grad_norm, lr

    def _count_skips(self, was_skipped: bool) -> None:
        progress, limit = self.progress, self.config.trainer.max_skipped_steps
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if was_skipped else 0
        if not was_skipped:
            return
        progress.skipped += 1
        logger.warning(f"step {progress.step}: loss or gradient is not finite; the step is skipped")
        if progress.skipped_in_a_row >= limit:
            raise TrainingError(
                f"{limit} steps in a row had a non-finite loss or gradient (trainer.max_skipped_steps={limit}); "
                "the last checkpoint is intact: go on from it with a lower optim.lr, or with "
                "trainer.precision=fp32"
            )

    def _report(self, grad_norm: float, lr: float) -> None:
        step, max_steps = self.progress.step, self.config.trainer.max_steps
        window = self._window.result(self._runtime.sum([self._window.local_loss])[0])
        bpb = None if self._bytes_per_token is None else bits_per_byte(window.loss, self._bytes_per_token)
        logger.info(
            progress_line(
                step,
                max_steps,
                window,
                bpb=bpb,
                grad_norm=grad_norm,
                lr=lr,
                skipped=self.progress.skipped,
                failed_saves=self._failed_saves,
            )
        )
        values = {
            "train/loss": window.loss,
            **({} if bpb is None else {"train/bits_per_byte": bpb}),
            "train/grad_norm": grad_norm,
            "train/lr": lr,
            "train/skipped_steps": self.progress.skipped,
            "data/damaged": self._intake.n_damaged,
            "checkpoint/failed_saves": self._failed_saves,
            "perf/tokens_per_s": window.tokens_per_s,
            "perf/peak_memory_gib": peak_memory_gib(self._runtime.device),
        }
        self._journal.scalars(values, step, self.progress.seconds)
        self._window.reset()

    def _save(self, *, must: bool) -> None:
        """Saves the step just done: in the background, or, if it `must` succeed, before this returns."""
        self._settle(wait=True)
        self.progress.window = self._window.state if self._window.has_steps else {}
        try:
            # first: a checkpoint must not be ahead of what was written down
            self._runtime.on_main(self._journal.flush)
            self._saver.begin(self.progress, self._data_state)
            if must:
                self._saver.wait(wait=True)
        except UserError as error:
            if must:
                raise
            self._tell_of_failed_save(error)

    def _settle(self, *, wait: bool) -> None:
        """Learns what became of the save in the background, if it is done; waits for it if asked to."""
        try:
            self._saved_step = self._saver.wait(wait=wait) or self._saved_step
        except UserError as error:
            self._tell_of_failed_save(error)

    def _tell_of_failed_save(self, error: UserError) -> None:
        # the run goes on: a later save may succeed, and the last good checkpoint stands
        self._failed_saves += 1
        logger.warning(f"a checkpoint could not be written: {error}")
