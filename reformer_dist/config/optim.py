"""The optimizer, its learning rate schedule, and ZeRO."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from reformer_dist.config.checks import LARGEST_INT64, ConfigGroup, bounded, require
from reformer_dist.errors import ConfigError


class Schedule(Enum):
    cosine = "cosine"
    linear = "linear"
    inverse_sqrt = "inverse_sqrt"
    constant = "constant"
    wsd = "wsd"


class DecayShape(Enum):
    linear = "linear"
    cosine = "cosine"
    one_minus_sqrt = "one_minus_sqrt"


OPEN_ENDED = (Schedule.inverse_sqrt, Schedule.constant, Schedule.wsd)
"""Schedules that do not depend on trainer.max_steps."""


class OptimizerKind(Enum):
    adamw = "adamw"
    muon = "muon"
    adafactor = "adafactor"


class Average(Enum):
    none = "none"
    exponential = "exponential"
    window = "window"


@dataclass(kw_only=True)
class ParameterGroup(ConfigGroup, prefix="optim.groups[]."):
    """Settings of the parameters whose names match a pattern. The first group that matches a parameter applies."""

    match: str = ""
    """Shell-style pattern of parameter names, such as embedding.* or stack.blocks.[01].*"""
    lr: float | None = bounded(None, least=0)
    """Peak learning rate of these parameters; null means optim.lr. The schedule is that of all."""
    weight_decay: float | None = bounded(None, least=0)
    """Weight decay of these parameters, vectors and embeddings included; null means the rule for all."""
    frozen: bool = False
    """Not trained: without gradients and optimizer states."""

    def __post_init__(self) -> None:
        super().__post_init__()
        key = "optim.groups[].match"
        require(self.match != "", key, "''", "must be a pattern of parameter names, such as embedding.*")
        has_values = self.lr is not None or self.weight_decay is not None
        require(has_values or self.frozen, key, self.match, "sets nothing; give lr, weight_decay or frozen=true")
        if self.frozen and has_values:
            raise ConfigError(f"{key}={self.match}: frozen=true excludes lr and weight_decay, which need training")


@dataclass(kw_only=True)
class OptimConfig(ConfigGroup, prefix="optim."):
    """The optimizer. Weight decay applies to matrices, not to vectors and embeddings."""

    kind: OptimizerKind = OptimizerKind.adamw
    """adamw; muon for the matrices of the layers, and AdamW for the rest; or adafactor."""
    lr: float = bounded(1e-3, least=0)
    """Peak learning rate, reached after the warmup. In Adafactor, relative to the size of a parameter."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Of AdamW."""
    eps: float = bounded(1e-8, least=0)
    """Of AdamW."""
    momentum: float = bounded(0.95, least=0, below=1)
    """Of Muon."""
    weight_decay: float = bounded(0.01, least=0)
    """Of matrices; decoupled from the gradient, and scaled by the learning rate."""
    groups: list[ParameterGroup] = field(default_factory=list)
    """Learning rate and weight decay by pattern of names, and parameters that are not trained."""
    grad_clip: float = bounded(1.0, least=0)
    """Maximum norm of the gradient; 0 disables clipping."""
    schedule: Schedule = Schedule.cosine
    """After the warmup: cosine or linear decay up to trainer.max_steps, inverse_sqrt, constant, or wsd (warmup,
    stable, decay), which stays at lr up to decay_from."""
    warmup_steps: int = bounded(100, least=0)
    """Steps over which the learning rate rises linearly to lr."""
    min_lr_ratio: float = bounded(0.1, least=0, most=1)
    """cosine, linear and the decay from decay_from end at this fraction of lr."""
    decay_from: int | None = bounded(None, least=0)
    """wsd, constant, inverse_sqrt: steps after which the rate decays, up to trainer.max_steps; null: never. A run
    that resumes from a checkpoint of this step or earlier branches off there."""
    decay: DecayShape = DecayShape.linear
    """Shape of the decay from decay_from: linear, cosine or one_minus_sqrt."""
    restarts: list[int] = field(default_factory=list)
    """cosine, linear: steps at which the schedule has ended and begins again, with a warmup from its last rate."""
    accept_jump: bool = False
    """Resume although the schedule goes on at another rate than the checkpoint's, since its end has changed."""
    average: Average = Average.none
    """Average of the weights, evaluated beside them: exponential, or of the last window of steps."""
    average_decay: float = bounded(0.999, least=0, below=1)
    """exponential: the share of the old average that a step keeps, once it is long enough."""
    average_window: int = bounded(1000, least=1)
    """window: the average is that of at least this many steps, and at most twice as many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.betas) == 2, "optim.betas", self.betas, "must hold two numbers")
        is_valid = all(0 <= beta < 1 for beta in self.betas)
        require(is_valid, "optim.betas", self.betas, "must both be at least 0 and below 1")
        has_rates = any(group.lr is not None for group in self.groups)
        require(self.lr > 0 or not has_rates, "optim.lr", self.lr, "must be above 0 if optim.groups set lr")
        self._check_schedule()

    def _check_schedule(self) -> None:
        name, ends = self.schedule.name, self.schedule not in OPEN_ENDED
        if self.decay_from is not None:
            requirement = f"needs optim.schedule=wsd, constant or inverse_sqrt: {name} decays by itself"
            require(not ends, "optim.decay_from", self.decay_from, requirement)
            requirement = f"must be at least optim.warmup_steps={self.warmup_steps}"
            require(self.decay_from >= self.warmup_steps, "optim.decay_from", self.decay_from, requirement)
        is_valid = self.restarts == sorted(set(self.restarts)) and min(self.restarts, default=1) > 0
        require(is_valid, "optim.restarts", self.restarts, "must be ascending numbers of steps above 0")
        requirement = f"needs optim.schedule=cosine or linear: {name} has no end after which it could begin again"
        require(ends or not self.restarts, "optim.restarts", self.restarts, requirement)


@dataclass(kw_only=True)
class DeepSpeedConfig(ConfigGroup, prefix="deepspeed."):
    """ZeRO, as chosen by deepspeed=zero0 .. zero3."""

    stage: int = bounded(0, least=0, most=3)
    """0: nothing is sharded; 1: optimizer states; 2: gradients too; 3: parameters too."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory (stages 1 to 3)."""
    reduce_bucket_size: int = bounded(50_000_000, least=1, most=LARGEST_INT64)
    """Gradient elements per all-reduce."""
    param_persistence_threshold: int = bounded(100_000, least=0, most=LARGEST_INT64)
    """Stage 3: parameters with fewer elements are not sharded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_valid = self.stage > 0 or not self.offload_optimizer
        require(is_valid, "deepspeed.offload_optimizer", True, "needs deepspeed.stage of 1, 2 or 3")
