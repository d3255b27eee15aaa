"""The training loop: `fit` is the order of things, `_train_step` the work of one step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from reformer_dist.config import RunConfig
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.engine import TrainEngine
from reformer_dist.engine.optim import learning_rate
from reformer_dist.errors import TrainingError, UserError
from reformer_dist.log import logger
from reformer_dist.parallel import SlicedSequence
from reformer_dist.seeds import derive_seed
from reformer_dist.training.intake import Intake, Rows
from reformer_dist.training.metrics import Window, bits_per_byte, peak_memory_gib, progress_line
from reformer_dist.training.tensorboard import Board


@dataclass
class Progress:
    """How far a run is: what a checkpoint remembers beside weights and data position."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    skipped: int = 0
    skipped_in_a_row: int = 0


class Saver(Protocol):
    def save(self, progress: Progress, data_state: dict[str, Any]) -> None:
        """Writes the checkpoint of the step just done."""
        ...


class Observer(Protocol):
    """Looks at the model beside training; called on every rank with the step just done."""

    def evaluate(self, step: int) -> None: ...

    def sample(self, step: int) -> None: ...


class Trainer:
    """A run on one rank; every rank makes the same calls in the same order."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        engine: TrainEngine,
        sequence: SlicedSequence,
        intake: Intake,
        saver: Saver,
        observer: Observer,
        board: Board,
        progress: Progress,
        bytes_per_token: float,
    ) -> None:
        self.config = config
        self.progress = progress
        self._runtime, self._engine, self._sequence, self._intake = runtime, engine, sequence, intake
        self._saver, self._observer, self._board = saver, observer, board
        self._bytes_per_token = bytes_per_token
        self._window = Window(runtime.device)

    def fit(self) -> None:
        """Trains up to trainer.max_steps, then evaluates and saves. Raises UserError alike on every rank."""
        settings = self.config.trainer
        if self.progress.step >= settings.max_steps:
            logger.info(f"already at step {self.progress.step} of {settings.max_steps}: nothing to train")
            return
        self._window.reset()
        while self.progress.step < settings.max_steps:
            rows = self._intake.next_rows()
            self._train_step(rows)
            start = time.perf_counter()
            if self._is_due(settings.eval_every):
                self._observer.evaluate(self.progress.step)
            if self._is_due(settings.sample_every):
                self._observer.sample(self.progress.step)
            if self._is_due(settings.save_every):
                self._save(rows.state)
            self._window.pause(time.perf_counter() - start)

    def _is_due(self, interval: int) -> bool:
        """Every `interval` steps and at the end; never if it is 0."""
        step = self.progress.step
        return interval > 0 and (step % interval == 0 or step == self.config.trainer.max_steps)

    def _train_step(self, rows: Rows) -> None:
        step, device, sequence = self.progress.step, self._runtime.device, self._sequence
        inputs, labels = rows.inputs.to(device), rows.labels.to(device)
        n_micro, n_rows, _ = inputs.shape
        mask = sequence.key_padding_mask(n_rows, device)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for micro in range(n_micro):
            loss = self._engine.forward(
                inputs[micro],
                labels[micro],
                key_padding_mask=mask,
                step=step,
                dropout_seed=derive_seed("dropout", self.config.trainer.seed, step),
                first_row=(sequence.grid.dp_rank * n_micro + micro) * n_rows,
                sequence=sequence,
            )
            self._engine.backward(loss, rows.valid_tokens)
            loss_sum += loss.detach()
        lr = learning_rate(self.config.optim, step, self.config.trainer.max_steps)
        result = self._engine.step(lr)
        self.progress.step = step + 1
        self._window.add(loss_sum, rows.valid_tokens, was_skipped=result.was_skipped)
        self._count_skips(result.was_skipped)
        if self._is_due(self.config.trainer.log_every):
            self._report(result.grad_norm, lr)

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
        bpb = bits_per_byte(window.loss, self._bytes_per_token)
        logger.info(
            progress_line(
                step, max_steps, window, bpb=bpb, grad_norm=grad_norm, lr=lr, skipped=self.progress.skipped
            )
        )
        values = {
            "train/loss": window.loss,
            "train/bits_per_byte": bpb,
            "train/grad_norm": grad_norm,
            "train/lr": lr,
            "train/skipped_steps": self.progress.skipped,
            "data/damaged": self._intake.n_damaged,
            "perf/tokens_per_s": window.tokens_per_s,
            "perf/peak_memory_gib": peak_memory_gib(self._runtime.device),
        }
        self._board.scalars(values, step)
        self._window.reset()

    def _save(self, data_state: dict[str, Any]) -> None:
        self._board.flush()
        try:
            self._saver.save(self.progress, data_state)
        except UserError as error:
            if self.progress.step == self.config.trainer.max_steps:
                raise
            # the run goes on: a later save may succeed, and the last good checkpoint stands
            logger.warning(f"step {self.progress.step}: the checkpoint could not be written: {error}")
