"""Model, rows and settings of the ZeRO cases and their reference without DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reformer_dist.config import (
    DataConfig,
    DeepSpeedConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    Recompute,
    RunConfig,
    TrainerConfig,
)
from reformer_dist.models import ReformerLM

STEPS, ROWS, SEQ_LEN, MICRO, VOCAB = 4, 8, 64, 2, 50
VALID = float(ROWS * SEQ_LEN)
LEARNING_RATES = (0.01, 0.02, 0.01, 0.005)


@dataclass(frozen=True)
class Case:
    """A way to train the same model for the same steps."""

    stage: int = 0
    offload: bool = False
    precision: str = "fp32"
    recompute: str = "reversible"
    shared: bool = False
    frozen: bool = False
    """The embedding is not trained (and then not tied)."""
    layer_drop: bool = False

    @property
    def name(self) -> str:
        flags = [word for word in ("offload", "shared", "frozen", "layer_drop") if getattr(self, word)]
        return "-".join([f"zero{self.stage}", self.precision, self.recompute, *flags])

    def config(self) -> RunConfig:
        model = ModelConfig(
            dim=32,
            n_layers=4,
            n_heads=2,
            n_buckets=8,
            window=16,
            local_window=16,
            axial_shape=[16, 16],
            dropout=0.1,
            layer_drop=0.4 if self.layer_drop else 0.0,
            tie_embeddings=not self.frozen,
            share_layers=self.shared,
            recompute=Recompute[self.recompute],
        )
        # buckets and thresholds so small that this model is split into several partitions
        zero = DeepSpeedConfig(
            stage=self.stage,
            offload_optimizer=self.offload,
            param_persistence_threshold=100,
            reduce_bucket_size=20_000,
        )
        trainer = TrainerConfig(micro_batch_size=MICRO, precision=Precision[self.precision])
        data = DataConfig(seq_len=SEQ_LEN, batch_size=ROWS)
        # a norm that some steps exceed and some don't; with the usual eps, Adam makes whole steps out of the
        # rounding of gradients that are nearly 0
        optim = OptimConfig(grad_clip=0.26 if self.frozen else 0.5, eps=1e-5)
        return RunConfig(model=model, data=data, deepspeed=zero, trainer=trainer, optim=optim)

    def model(self) -> ReformerLM:
        model = ReformerLM(self.config().model, VOCAB, seed=1)
        if self.frozen:
            model.embedding.tokens.weight.requires_grad_(False)
        return model


# By number of processes: what is trained, resumed and hit by a bad step; what is only trained; and which
# stage's checkpoint which stage reads (one process reads those that two have written).
PROVED = {
    1: [Case(0), Case(2), Case(3)],
    2: [*map(Case, range(4)), *(Case(stage, precision="bf16") for stage in range(4))],
}
TRAINED = {
    1: [Case(1), Case(3, offload=True)],
    2: [
        *(Case(stage, offload=True) for stage in (1, 2, 3)),
        *(Case(stage, frozen=True) for stage in (0, 2, 3)),
        *(Case(stage, shared=True) for stage in (0, 2)),
        *(Case(stage, layer_drop=True) for stage in (0, 2, 3)),
        *(Case(stage, recompute="checkpoint") for stage in (2, 3)),
        Case(3, recompute="none"),
    ],
}
READ = {1: [(3, 0), (3, 1), (0, 2), (1, 3)], 2: [(0, 1), (1, 2), (2, 0), (2, 3)]}


def read_name(source: int, stage: int) -> str:
    return f"zero{source}-read-at-zero{stage}"


@dataclass
class Outcome:
    """Results of a case by step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    heldout: dict[str, float] = field(default_factory=dict)
    """Held-out loss by number of steps."""
    decoding_error: float = math.inf
    """Largest difference between logits of decoding token by token and of one forward."""


def rows(step: int) -> Tensor:
    """Rows [8, 65] of a step."""
    return torch.randint(0, VOCAB, (ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(step))


def micro_batches(step: int, rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Inputs, labels and seeds of each micro-batch that a rank takes of a step."""
    share = rows(step).view(world_size, -1, MICRO, SEQ_LEN + 1)[rank]
    for number, part in enumerate(share):
        seeds = {"step": step, "dropout_seed": step * 100 + rank * 10 + number}
        yield part[:, :-1], part[:, 1:], seeds
