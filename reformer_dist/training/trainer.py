"""Trainer: the training loop. `fit` runs all steps, `_train_step` does the work of one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reformer_dist.config.stages import Stage
from reformer_dist.distributed.runtime import Preempted, SharedError, Unavailable
from reformer_dist.engine.schedule import learning_rate
from reformer_dist.errors import NonFiniteError, TrainingError, UserError
from reformer_dist.ops.profiling import part
from reformer_dist.process.live_line import SEPARATOR, live
from reformer_dist.process.log import logger
from reformer_dist.seeds import derive_seed
from reformer_dist.training.batches import BatchReader, StepInputs
from reformer_dist.training.best import BestTracker
from reformer_dist.training.divergence import DivergenceMonitor
from reformer_dist.training.metrics import (
    MetricsWindow,
    StepCost,
    bits_per_byte,
    peak_memory_gib,
    progress_figures,
)
from reformer_dist.training.metrics_log import MetricsLogger
from reformer_dist.training.parts import EngineParts, RunContext, TaskData
from reformer_dist.training.profiler import StepProfiler
from reformer_dist.training.spikes import SpikeMonitor
from reformer_dist.training.validator import Validator
from reformer_dist.training.watchdog import Watchdog


@dataclass(frozen=True)
class StageParts:
    """What the steps of one stage of a run read, and how they are evaluated."""

    stage: Stage
    """trainer.max_steps of its config is the step at which the run ends."""
    data: TaskData
    batches: BatchReader
    validator: Validator
    cost: StepCost | None
    """For the MFU; None if the peak of the devices or the length of rows is unknown."""


OpenNext = Callable[[int, list[dict[str, Any]]], StageParts]
"""(steps done, loader states of all ranks) -> the stage that begins; prepares the engine for it."""


class Trainer:
    """A run on one rank. Every rank makes the same calls in the same order."""

    def __init__(
        self,
        run: RunContext,
        parts: EngineParts,
        stage: StageParts,
        open_next: OpenNext,
        metrics: MetricsLogger,
    ) -> None:
        """stage: for which the engine is prepared."""
        self.state = parts.state
        self._runtime, self._engine, self._checkpoints = run.runtime, parts.engine, parts.checkpoints
        self._open_next, self._metrics = open_next, metrics
        self._use(stage)
        self._metrics_window = MetricsWindow(run.runtime.device)
        self._watchdog = Watchdog(run.runtime, run.config.trainer.step_timeout)
        self._profiler = StepProfiler(run.config.trainer.profile, Path(run.config.output_dir), run.runtime)
        self._data_state = stage.batches.initial_state
        self._monitor = DivergenceMonitor(
            run.config, run.runtime, parts.checkpoints, parts.state, stage.data.task.guessing_loss
        )
        self._spikes = SpikeMonitor(run.config, run.runtime, parts.state)
        self._skipped_ranges = run.config.data.skipped_ranges()
        self._best = BestTracker(run.config.trainer, parts.state, stage.validator.metrics)
        self._is_save_due = False
        self._failed_saves = 0  # since this process started
        self._saved_step = parts.state.step  # no need to save again at this step

    def _use(self, parts: StageParts) -> None:
        self._stage, self.config = parts.stage, parts.stage.config
        self._batch_reader, self._validator, self._cost = parts.batches, parts.validator, parts.cost
        self._bytes_per_token = parts.data.bytes_per_token

    def fit(self) -> None:
        """Trains until trainer.max_steps or early stopping (trainer.patience), then evaluates and saves.

        Raises the same exception on every rank: UserError, or Preempted after saving if any rank received a stop
        signal or can't reach its data.
        """
        if self._is_finished and self.state.is_observed:
            end = f": {self._best.describe()}" if self._best.should_stop else ""
            logger.info(
                f"already at step {self.state.step} of {self.config.trainer.max_steps}: nothing to train{end}"
            )
            self._metrics.end_step()
            return
        self._metrics_window.reset()
        if self.state.window:
            self._metrics_window.load_state(self.state.window)
        try:
            with self._watchdog.watching():
                self._train()
        except (Preempted, Unavailable) as error:
            raise Preempted(f"{error}: {self._save_before_exit()}") from None
        except (SharedError, TrainingError):  # on every rank
            self._wait_for_save(block=True)
            raise
        finally:
            self._profiler.close()

    def _train(self) -> None:
        if not self.state.is_observed:
            self._evaluate_and_sample()
        self._metrics.end_step()
        live.progress(self.state.step, self.config.trainer.max_steps)
        shown = "compiling" if self._runtime.device.type == "cuda" else ""  # kernels, in the first step
        while not self._is_finished:
            self._enter_stage_if_due()
            start = time.perf_counter()
            step = self.state.step + 1
            with self._profiler.step(step):
                with (
                    self._watchdog.phase(f"waiting for data of step {step} (here or on another rank)"),
                    part("data"),
                ):
                    inputs = self._batch_reader.next_step()
                self._metrics_window.add_data_wait(time.perf_counter() - start)
                with self._watchdog.phase(f"computing step {step}"), live.phase(shown):
                    grad_norm, lr = self._train_step(inputs)
            live.progress(step, self.config.trainer.max_steps)
            shown = ""
            self._data_state = inputs.data_state
            self.state.seconds += time.perf_counter() - start
            if self._is_due(self.config.trainer.log_every):
                self._log_metrics(grad_norm, lr)
            end = time.perf_counter()
            self._evaluate_and_sample()
            self._metrics.end_step()
            with self._watchdog.phase(f"saving after step {step}"):
                self._save_if_due()
            self._metrics_window.exclude_time(time.perf_counter() - end)

    def _enter_stage_if_due(self) -> None:
        step, end = self.state.step, self._stage.end_step
        if end is not None and step >= end:
            start = time.perf_counter()
            with self._watchdog.phase(f"opening the data after step {step}"), live.phase("opening the data"):
                self._use(self._open_next(step, self._runtime.gather(self._data_state)))
                self._data_state = self._batch_reader.initial_state
            self._metrics_window.exclude_time(time.perf_counter() - start)
        if step == self._stage.first_step:  # also if the run resumes here
            self._spikes.begin_stage()
            self._best.begin_stage()

    def _evaluate_and_sample(self) -> None:
        """Evaluates, and generates text, if due."""
        self.state.is_observed = False
        if self._is_due(self.config.trainer.eval_every):
            with self._watchdog.phase(f"evaluating after step {self.state.step}"), live.phase("evaluating"):
                values = self._validator.evaluate(self.state.step, self.state.seconds)
            self._monitor.end_evaluation(values["eval/loss"])
            if not self._monitor.is_broken:
                self._is_save_due |= self._best.end_evaluation(values)
            if self._best.should_stop:
                logger.info(f"step {self.state.step} is the last: {self._best.describe()}")
        if self._is_due(self.config.trainer.sample_every):
            with live.phase("generating text"):
                self._validator.generate_text(self.state.step)
        self.state.is_observed = True

    def _save_if_due(self) -> None:
        """Saves every trainer.save_every steps, on a new best evaluation, and at the end of the run.

        A save that is due while the loss or gradient is not finite is postponed.
        """
        step, is_last = self.state.step, self._is_finished
        is_due = self._is_due(self.config.trainer.save_every)
        if is_due and self._monitor.is_broken:
            if is_last:
                self._monitor.stop(
                    f"step {step}, the last one, had a non-finite loss or gradient: it is not saved"
                )
            logger.warning(
                f"step {step} is not saved, since its loss or gradient is not finite; the next finite one will be"
            )
        self._is_save_due |= is_due
        if not self._is_save_due or self._monitor.is_broken:
            self._wait_for_save(block=False)
            return
        self._is_save_due = False
        if is_last:
            self._monitor.end_run()
        self._save(must_succeed=is_last)

    def _save_before_exit(self) -> str:
        """Saves unless the step is already saved or its weights are bad; returns a message with the outcome."""
        self._wait_for_save(block=True)
        step, saved = self.state.step, self._saved_step
        if step == saved:
            return f"no step since the checkpoint of step {step}" if step else "before the first step"
        if self._monitor.is_broken:
            reason = "its loss or gradient is not finite"
            left = f"the last checkpoint is from step {saved}" if saved else "there is no checkpoint"
            return f"step {step} is not saved, since {reason}; {left}"
        self._save(must_succeed=True)
        change = " with resume=auto" if self.config.resume == "never" else ""
        return f"saved step {step}; run the same command again{change} to resume from it"

    def _is_due(self, interval: int) -> bool:
        """True every `interval` steps and at the end of the run; never if it is 0."""
        return interval > 0 and (self.state.step % interval == 0 or self._is_finished)

    @property
    def _is_finished(self) -> bool:
        return self.state.step >= self.config.trainer.max_steps or self._best.should_stop

    def _train_step(self, inputs: StepInputs) -> tuple[float, float]:
        """Returns (gradient norm, learning rate)."""
        step_index, device = self.state.step, self._runtime.device
        lr = learning_rate(self.config.optim, step_index, self.config.trainer.max_steps)
        if any(step_index + 1 in steps for steps in self._skipped_ranges):
            self.state.step = step_index + 1
            self._monitor.pass_over()
            logger.info(f"step {step_index + 1}: its rows are not trained on (data.skip_steps)")
            return math.nan, lr
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for batch in inputs.micro_batches:
            with part("forward"):
                loss = self._engine.forward(
                    **batch.to(device),
                    step=step_index,
                    dropout_seed=derive_seed("dropout", self.config.trainer.seed, step_index),
                    **batch.sequences,
                )
            with part("backward"):
                self._engine.backward(loss, inputs.n_labels)
            loss_sum += loss.detach()
        self._spikes.begin_step(loss_sum, inputs.n_labels)
        accepts = self._spikes.accepts if self.config.trainer.skip_spikes else None
        with part("optimizer"):
            result = self._engine.step(lr, accepts)
        self.state.step = step_index + 1
        flops = self._cost.flops if self._cost else 0.0
        self._metrics_window.add(loss_sum, inputs.n_labels, was_skipped=result.was_skipped, flops=flops)
        samples, was_skipped = inputs.batch.samples, result.was_skipped
        self._spikes.end_step(was_skipped=was_skipped, grad_norm=result.grad_norm, samples=samples)
        self._monitor.end_step(loss_sum, inputs.n_labels, result)
        return result.grad_norm, lr

    def _log_metrics(self, grad_norm: float, lr: float) -> None:
        step, max_steps = self.state.step, self.config.trainer.max_steps
        metrics = self._metrics_window.result(self._runtime.sum([self._metrics_window.local_loss])[0])
        bpb = None if self._bytes_per_token is None else bits_per_byte(metrics.loss, self._bytes_per_token)
        mfu = None if self._cost is None else metrics.flops_per_s / self._cost.peak
        memory = peak_memory_gib(self._runtime.device)
        figures = progress_figures(
            metrics,
            steps_left=max_steps - step,
            bpb=bpb,
            mfu=mfu,
            memory_gib=memory,
            grad_norm=grad_norm,
            lr=lr,
            counts={
                "spikes": self.state.spikes,
                "skipped": self.state.skipped,
                "failed saves": self._failed_saves,
            },
        )
        if live.is_shown:
            live.figures(figures)
        else:
            logger.info(SEPARATOR.join([f"step {step:>{len(str(max_steps))}}/{max_steps}", *figures]))
        values = {
            "train/loss": metrics.loss,
            **({} if bpb is None else {"train/bits_per_byte": bpb}),
            "train/grad_norm": grad_norm,
            "train/lr": lr,
            "train/skipped_steps": self.state.skipped,
            "train/spikes": self.state.spikes,
            "data/damaged": self._batch_reader.n_damaged,
            "checkpoint/failed_saves": self._failed_saves,
            "perf/tokens_per_s": metrics.tokens_per_s,
            "perf/data_wait": metrics.data_wait,
            **({} if mfu is None else {"perf/mfu": mfu}),
            "perf/peak_memory_gib": memory,
        }
        self._metrics.scalars(values, step, self.state.seconds)
        self._metrics_window.reset()
        self._monitor.log_loss(metrics.loss)

    def _save(self, *, must_succeed: bool) -> None:
        """Saves the step just done, in the background; if it must succeed, waits for it."""
        self._wait_for_save(block=True)
        self.state.window = self._metrics_window.state if self._metrics_window.has_steps else {}
        self._best.begin_save()
        try:
            with live.phase("saving"):
                # first, so that no checkpoint is ahead of the metrics on disk
                self._runtime.on_main(self._metrics.flush)
                self._checkpoints.start_save(self.state, self._data_state)
                if must_succeed:
                    self._checkpoints.wait()
        except NonFiniteError as error:
            self._monitor.stop(str(error))
        except UserError as error:
            if must_succeed:
                raise SharedError(f"{error}; {self._describe_lost_steps()}") from error
            self._count_failed_save(error)

    def _describe_lost_steps(self) -> str:
        """What is lost if the step just done can't be saved."""
        n_lost, saved = self.state.step - self._saved_step, self._checkpoints.last_saved
        steps, are = ("1 step", "is") if n_lost == 1 else (f"{n_lost} steps", "are")
        if saved is None:
            return f"{steps} {are} lost, since there is no checkpoint"
        advice = "once the cause is fixed, run the same command again to resume from it"
        return f"the {steps} since {saved} {are} lost; {advice}"

    def _wait_for_save(self, *, block: bool) -> None:
        """Finalizes a finished background save; with `block`, waits for it first."""
        try:
            step = self._checkpoints.wait(block=block)
            if step is not None:
                self._saved_step = step
                self._best.end_save(has_failed=False)
        except UserError as error:
            self._count_failed_save(error)

    def _count_failed_save(self, error: UserError) -> None:
        # training continues: a later save may succeed, and the last intact checkpoint remains
        self._failed_saves += 1
        self._best.end_save(has_failed=True)
        logger.warning(f"a checkpoint could not be written: {error}")
