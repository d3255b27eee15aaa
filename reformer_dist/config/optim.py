"""How weights move: AdamW and its schedule, and how ZeRO spreads the states."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from reformer_dist.config.checks import at_least, check_types, require


class Schedule(Enum):
    cosine = "cosine"
    linear = "linear"
    inverse_sqrt = "inverse_sqrt"
    constant = "constant"


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW; matrices decay, while vectors and embeddings do not."""

    lr: float = 1e-3
    """Highest learning rate, reached after the warm-up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it alone."""
    schedule: Schedule = Schedule.cosine
    """Course after the warm-up: cosine, linear, inverse_sqrt or constant."""
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    """cosine and linear end at this share of lr."""

    def __post_init__(self) -> None:
        check_types(self, "optim")
        at_least(0, optim__lr=self.lr, optim__eps=self.eps, optim__weight_decay=self.weight_decay)
        at_least(0, optim__grad_clip=self.grad_clip, optim__warmup_steps=self.warmup_steps)
        require(len(self.betas) == 2, "optim.betas", self.betas, "must hold two numbers")
        fits = all(0 <= beta < 1 for beta in self.betas)
        require(fits, "optim.betas", self.betas, "must be at least 0 and below 1, both")
        require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "must be from 0 to 1")


@dataclass(kw_only=True)
class DeepSpeedConfig:
    """ZeRO, as chosen by deepspeed=zero0 .. zero3."""

    stage: int = 0
    """0: nothing is sharded; 1: optimizer states; 2: gradients too; 3: parameters too."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory (stages 1 to 3)."""
    reduce_bucket_size: int = 50_000_000
    """Elements of gradient reduced at a time."""
    param_persistence_threshold: int = 100_000
    """Stage 3: parameters with fewer elements stay whole on every rank."""

    def __post_init__(self) -> None:
        check_types(self, "deepspeed")
        require(self.stage in (0, 1, 2, 3), "deepspeed.stage", self.stage, "must be 0, 1, 2 or 3")
        sharded = self.stage > 0 or not self.offload_optimizer
        require(sharded, "deepspeed.offload_optimizer", True, "needs deepspeed.stage of 1, 2 or 3")
        at_least(1, deepspeed__reduce_bucket_size=self.reduce_bucket_size)
        at_least(0, deepspeed__param_persistence_threshold=self.param_persistence_threshold)
