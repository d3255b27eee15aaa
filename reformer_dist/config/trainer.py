"""Length of training, precision, logging and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from reformer_dist.config.checks import LARGEST_INT64, MONTH, ConfigGroup, bounded, require


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class BestMode(Enum):
    auto = "auto"
    min = "min"
    max = "max"


BEST_BY_NAME = {"loss": BestMode.min, "bits_per_byte": BestMode.min, "accuracy": BestMode.max}
"""Whether lower or higher values of a metric of the evaluation are better."""


@dataclass(kw_only=True)
class TrainerConfig(ConfigGroup, prefix="trainer."):
    """The training loop. Intervals are in optimizer steps; 0 means never."""

    max_steps: int = bounded(1000, least=1)
    """Optimizer steps of the run."""
    seed: int = bounded(0, least=0, most=LARGEST_INT64)
    """Seed of the initial weights, data order, hash rotations and dropout."""
    precision: Precision = Precision.fp32
    """fp32, bf16, or fp16 (GPU only). Residual streams, softmax and loss stay float32."""
    micro_batch_size: int | None = bounded(None, least=1)
    """Rows of one forward pass of a rank; null means all of the rank's rows of data.batch_size."""
    log_every: int = bounded(10, least=0)
    """Steps between lines and points of the training metrics."""
    eval_every: int = bounded(100, least=0)
    """Steps between evaluations on held-out rows."""
    save_every: int = bounded(100, least=0)
    """Steps between checkpoints."""
    keep_checkpoints: int = bounded(2, least=0)
    """Newest checkpoints to keep on disk; 0 keeps all."""
    keep_every: int = bounded(0, least=0)
    """Checkpoints whose step is a multiple of it are never deleted; 0: no such checkpoints."""
    keep_best: str | None = None
    """Metric of the evaluation, such as eval/loss, eval/accuracy or eval_average/loss: the checkpoint with its
    best value is saved and never deleted."""
    best_mode: BestMode = BestMode.auto
    """Whether the lowest or the highest value of keep_best is the best; auto goes by the name of the metric."""
    patience: int = bounded(0, least=0)
    """The run ends after this many evaluations in a row without a better value of keep_best; 0: it does not."""
    sample_every: int = bounded(0, least=0)
    """Steps between text samples, which continue held-out text."""
    sample_tokens: int = bounded(200, least=1, most=2**20)
    """Tokens of each text sample."""
    max_skipped_steps: int = bounded(10, least=1)
    """The run stops after this many consecutive steps with a non-finite loss or gradient."""
    max_diverged_steps: int = bounded(1000, least=0)
    """The run stops once the loss has been above that of a uniform guess, ln(vocabulary), for this many steps
    after the warmup; 0: it only warns."""

    spike_sigma: float = bounded(6.0, least=0)
    """A step is a spike if its loss or gradient norm is above the running mean by more than this many running
    deviations; it is counted, and written to spikes.jsonl with the ids of its samples. 0: no step is."""
    spike_window: int = bounded(100, least=2)
    """Steps over which the mean and the deviation run; as many at the beginning are not judged."""
    skip_spikes: bool = False
    """Spikes change neither weights nor optimizer state, as steps with a non-finite gradient."""

    profile: list[int] | None = None
    """[from, to]: traces of these steps, and a table of their time by part, are written to output_dir/profile."""

    step_timeout: float = bounded(0.0, least=0, most=MONTH, hint="that is a month")
    """A rank logs what it is doing when a part of a step takes longer than this many seconds; 0 means never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_valid = self.spike_sigma > 0 or not self.skip_spikes
        require(is_valid, "trainer.skip_spikes", True, "needs trainer.spike_sigma above 0")
        if self.profile is not None:
            requirement = f"must be [from, to] with 1 <= from <= to <= trainer.max_steps={self.max_steps}"
            is_valid = len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1] <= self.max_steps
            require(is_valid, "trainer.profile", self.profile, requirement)
        self._check_best()

    def _check_best(self) -> None:
        metric = self.keep_best
        if metric is None:
            requirement = "needs trainer.keep_best=eval/loss, or another metric"
            require(self.patience == 0, "trainer.patience", self.patience, requirement)
            return
        group, _, name = metric.partition("/")
        is_known = group in ("eval", "eval_average") and name in BEST_BY_NAME
        names = ", ".join(f"eval/{each}" for each in BEST_BY_NAME)
        require(is_known, "trainer.keep_best", metric, f"must be one of {names}, or the same of eval_average/")
        require(self.eval_every > 0, "trainer.keep_best", metric, "needs trainer.eval_every above 0")

    @property
    def higher_is_better(self) -> bool:
        """Whether keep_best improves as it rises."""
        name = (self.keep_best or "").partition("/")[2]
        mode = BEST_BY_NAME.get(name) if self.best_mode is BestMode.auto else self.best_mode
        return mode is BestMode.max
