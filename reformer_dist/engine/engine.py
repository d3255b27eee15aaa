"""TrainEngine: a model under DeepSpeed ZeRO, with the same step semantics at every stage.

A step's gradient is that of the mean loss over all valid tokens of the step, for any stage, number of ranks and
split into micro-batches. A step whose gradient is not finite changes neither weights nor optimizer state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reformer_dist.checkpoint import CheckpointReader, Fragment
from reformer_dist.checkpoint.average import AverageRecord
from reformer_dist.config import Average, Precision, RunConfig
from reformer_dist.engine.average import WeightAverage
from reformer_dist.engine.fragments import ModelShards
from reformer_dist.engine.groups import freeze, parameter_groups
from reformer_dist.engine.optim import build_optimizer, set_learning_rate
from reformer_dist.engine.rejection import Accepts, asked_before_update
from reformer_dist.engine.setup import deepspeed_dict, import_deepspeed, keep_float32_gradients


@dataclass(frozen=True)
class StepResult:
    grad_norm: float
    """Norm of the whole gradient before clipping; nan or inf if the step was skipped for it."""
    was_skipped: bool
    was_rejected: bool = False
    """Whether it was skipped because its finite gradient was not accepted."""


class TrainEngine:
    """Forward, backward and step of one model. Every rank makes the same calls in the same order."""

    def __init__(self, model: nn.Module, leaf_classes: list[type], config: RunConfig, world_size: int) -> None:
        """Freezes the parameters of `model` that optim.groups freeze. Raises ConfigError."""
        deepspeed = import_deepspeed()
        freeze(model, config.optim)
        groups = parameter_groups(model, config.optim)
        micro_batch, self.n_micro = config.micro_batching(world_size)
        self.stage = config.deepspeed.stage
        # DeepSpeed sees every rank as data-parallel, also ranks that share a sequence: its own sequence
        # parallelism scales gradients wrongly at some ZeRO stages
        self.world_size = world_size
        self._grad_clip = config.optim.grad_clip
        self._device_type = next(model.parameters()).device.type
        self._autocasts = self.stage == 0 and config.trainer.precision is Precision.bf16
        settings = deepspeed_dict(
            config.deepspeed, config.optim, config.trainer.precision, micro_batch, self.n_micro
        )
        deepspeed.init_distributed(
            dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False
        )
        if self.stage == 3:
            # gather a layer's parameters at once, since its backward is one autograd function
            deepspeed.utils.set_z3_leaf_modules(model, leaf_classes)
        rounds_weights = self.stage > 0 and config.trainer.precision is not Precision.fp32
        # DeepSpeed makes its float32 master weights of the rounded ones
        weights = {
            name: p.detach().cpu() for name, p in model.named_parameters() if rounds_weights or not p.requires_grad
        }
        frozen = {name: weights[name] for name, p in model.named_parameters() if not p.requires_grad}
        dtype = torch.float32 if config.trainer.precision is Precision.fp32 else torch.bfloat16
        optimizer = build_optimizer(groups, config.optim, dtype)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self._shards = ModelShards(self._engine, self.stage, groups, frozen)
        if rounds_weights:
            keep_float32_gradients(self._engine, self.stage)
            self._shards.set_masters(weights)
        if config.optim.average is not Average.none:
            self._shards.average = WeightAverage(config.optim, self._shards.masters)

    def set_micro_batching(self, micro_batch: int, n_micro: int) -> None:
        """Changes the rows of a micro-batch, and the micro-batches of a step, between two steps."""
        self.n_micro = n_micro
        self._engine.set_train_micro_batch_size(micro_batch)
        self._engine.set_train_batch_size(micro_batch * n_micro * self.world_size)
        self._engine.micro_steps = 0  # of which every n_micro-th ends a step
        if self.stage > 0:
            self._engine.optimizer.gradient_accumulation_steps = n_micro

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, in the run's precision."""
        with self.autocast():
            return self._engine(*args, **kwargs)

    def autocast(self) -> torch.autocast:
        """The autocast context of `forward`, for direct calls of the module."""
        # the uses of a cached bf16 weight (shared layers, chunks) would sum their gradients in bf16
        return torch.autocast(
            self._device_type, dtype=torch.bfloat16, enabled=self._autocasts, cache_enabled=False
        )

    def train(self, is_training: bool = True) -> None:
        self._engine.train(is_training)

    def backward(self, loss_sum: Tensor, valid_tokens: float) -> None:
        """Accumulates the gradient of this rank's summed loss, as its part of the step's mean.

        valid_tokens: number in the whole step, over all ranks and micro-batches.
        """
        # undoes DeepSpeed's average over ranks and micro-batches
        scale = self.world_size * self.n_micro / valid_tokens
        # an infinite or nan loss makes the factor nan, so that the gradient makes every rank skip the step
        self._engine.backward(loss_sum * (scale + loss_sum.detach() * 0.0))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # updates nothing, counts the micro-batch

    def step(self, lr: float, accepts: Accepts | None = None) -> StepResult:
        """Updates the weights after the step's last micro-batch, unless the gradient is not finite.

        accepts: if it returns False for the norm of a finite gradient, as it must on every rank, the step is
        skipped too.
        """
        set_learning_rate(self._engine.optimizer, lr)
        result = self._stage0_step(accepts) if self.stage == 0 else self._zero_step(accepts)
        if self._shards.average is not None and not result.was_skipped:
            self._shards.average.update()
        return result

    def _zero_step(self, accepts: Accepts | None) -> StepResult:
        scaler = self.scaler_state()
        with asked_before_update(self._engine.optimizer, self.stage, accepts) as rejected:
            self._engine.step()
        if rejected:
            self.load_scaler_state(scaler)  # DeepSpeed takes the step for an overflow, and lowers the scale
            return StepResult(rejected[0], was_skipped=True, was_rejected=True)
        if self._engine.optimizer.overflow:
            return StepResult(math.nan, was_skipped=True)
        return StepResult(float(self._engine.get_global_grad_norm()), was_skipped=False)

    def _stage0_step(self, accepts: Accepts | None) -> StepResult:
        """Checks, clips and applies gradients, which are complete and equal on every rank."""
        trained = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        is_finite = math.isfinite(norm)
        is_rejected = is_finite and accepts is not None and not accepts(float(norm))
        if not is_finite or is_rejected:
            for parameter in trained:
                parameter.grad = None  # AdamW skips parameters without a gradient
        elif self._grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(trained, self._grad_clip, norm)
        self._engine.step()
        return StepResult(float(norm), was_skipped=not is_finite or is_rejected, was_rejected=is_rejected)

    def fragments(self) -> list[Fragment]:
        """The fragments of parameters and optimizer states that this rank owns, as live float32 views."""
        return self._shards.owned()

    def load_fragments(self, reader: CheckpointReader) -> None:
        """Fills weights, optimizer states and averages from a checkpoint. Raises CheckpointError."""
        self._shards.load(reader)

    def load_moments(self, reader: CheckpointReader) -> None:
        """Fills optimizer states alone from a checkpoint. Raises CheckpointError if any is missing."""
        self._shards.load_moments(reader)

    @property
    def average(self) -> AverageRecord | None:
        """The average of the weights, if the run has one."""
        return None if self._shards.average is None else self._shards.average.record

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model has the average of its weights in this context; every rank enters it."""
        average, masters = self._shards.average, self._shards.masters
        assert average is not None
        weights = [master.detach().clone() for master in masters]
        try:
            for master in masters:
                master.data.copy_(average.average(master))
            self._shards.refresh_weights()
            yield
        except BaseException:
            self._restore(weights)  # but no collective, since other ranks may not have raised
            raise
        self._restore(weights)
        self._shards.refresh_weights()

    def _restore(self, weights: list[Tensor]) -> None:
        for master, weight in zip(self._shards.masters, weights, strict=True):
            master.data.copy_(weight)

    def scaler_state(self) -> dict[str, float]:
        """State of fp16's dynamic loss scaler; empty in other precisions."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        if scaler is None or not getattr(scaler, "dynamic", False):
            return {}
        return {name: getattr(scaler, name) for name in names if hasattr(scaler, name)}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """Restores a saved loss scale; ignored by a run that resumes in another precision."""
        if not self.scaler_state():
            return
        for name, value in state.items():
            setattr(self._engine.optimizer.loss_scaler, name, value)

    def close(self) -> None:
        self._engine.destroy()
