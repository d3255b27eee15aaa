"""How long to train, in which precision, and what to write down on the way."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from reformer_dist.config.checks import at_least, check_types


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@dataclass(kw_only=True)
class TrainerConfig:
    """The loop. Intervals are in optimizer steps; 0 means never."""

    max_steps: int = 1000
    seed: int = 0
    """Of initial weights, data order, hash rotations and dropout."""
    precision: Precision = Precision.fp32
    """fp32, bf16, or fp16 (GPU only). Residual streams, softmax and loss stay float32."""
    micro_batch_size: int | None = None
    """Rows that one rank handles at a time; null means its whole share of data.batch_size."""
    log_every: int = 10
    eval_every: int = 100
    save_every: int = 100
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of steps that it divides stay for good; 0 keeps no more than keep_checkpoints."""
    sample_every: int = 0
    sample_tokens: int = 200
    """Tokens of each text sample."""
    max_skipped_steps: int = 10
    """Steps in a row with a non-finite loss or gradient after which the run stops."""

    step_timeout: float = 0.0
    """Seconds after which a rank says what it is at, if a part of a step takes longer; 0 means never."""

    def __post_init__(self) -> None:
        check_types(self, "trainer")
        at_least(1, trainer__max_steps=self.max_steps, trainer__micro_batch_size=self.micro_batch_size)
        at_least(0, trainer__log_every=self.log_every, trainer__eval_every=self.eval_every)
        at_least(0, trainer__save_every=self.save_every, trainer__sample_every=self.sample_every)
        at_least(0, trainer__keep_checkpoints=self.keep_checkpoints, trainer__keep_every=self.keep_every)
        at_least(0, trainer__seed=self.seed, trainer__step_timeout=self.step_timeout)
        at_least(1, trainer__sample_tokens=self.sample_tokens)
        at_least(1, trainer__max_skipped_steps=self.max_skipped_steps)
