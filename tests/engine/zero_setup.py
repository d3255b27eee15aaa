"""Model, rows and settings of the ZeRO cases and their reference without DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reformer_dist.config import (
    Average,
    DataConfig,
    DeepSpeedConfig,
    ModelConfig,
    OptimConfig,
    OptimizerKind,
    ParameterGroup,
    Precision,
    Recompute,
    RunConfig,
    TrainerConfig,
)
from reformer_dist.models import ReformerLM

STEPS, ROWS, SEQ_LEN, MICRO, VOCAB = 4, 8, 64, 2, 50
VALID = float(ROWS * SEQ_LEN)
LEARNING_RATES = (0.01, 0.02, 0.01, 0.005)

GROUPS = [
    ParameterGroup(match="embedding.*", frozen=True),
    ParameterGroup(match="stack.blocks.0.*", frozen=True),
    ParameterGroup(match="*.feed_forward.*", lr=3e-4),
    ParameterGroup(match="stack.blocks.[12].*", weight_decay=0.2),
]


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
    optimizer: str = "adamw"
    average: str = "none"
    groups: bool = False
    """Groups of their own, some frozen, among them all of the embedding and a whole layer."""

    @property
    def name(self) -> str:
        flags = [word for word in ("offload", "shared", "frozen", "layer_drop", "groups") if getattr(self, word)]
        choices = [
            *([self.optimizer] if self.optimizer != "adamw" else []),
            *([self.average] if self.average != "none" else []),
        ]
        return "-".join([f"zero{self.stage}", self.precision, self.recompute, *flags, *choices])

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
            tie_embeddings=not (self.frozen or self.groups),
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
        clip = 0.7 if self.optimizer == "adafactor" else 0.26 if self.frozen or self.groups else 0.5
        optim = OptimConfig(
            grad_clip=clip,
            eps=1e-5,
            kind=OptimizerKind[self.optimizer],
            groups=GROUPS if self.groups else [],
            average=Average[self.average],
            average_decay=0.5,
            average_window=2,
        )
        return RunConfig(model=model, data=data, deepspeed=zero, trainer=trainer, optim=optim)

    def model(self) -> ReformerLM:
        model = ReformerLM(self.config().model, VOCAB, seed=1)
        if self.frozen:
            model.embedding.tokens.weight.requires_grad_(False)
        return model


MUON = [Case(stage, optimizer="muon", average="exponential") for stage in range(4)]
ADAFACTOR = [Case(stage, optimizer="adafactor", average="window") for stage in range(4)]
# By number of processes: what is trained, resumed and hit by a bad step; what is only trained; and which
# checkpoint which case reads (one process reads those that two have written).
PROVED = {
    1: [Case(0), Case(2), Case(3), MUON[0]],
    2: [*map(Case, range(4)), *(Case(stage, precision="bf16") for stage in range(4))],
}
TRAINED = {
    1: [Case(1), Case(3, offload=True)],
    2: [
        *(Case(stage, offload=True) for stage in (2, 3)),
        *(Case(stage, frozen=True) for stage in (2, 3)),
        Case(2, shared=True),
        *(Case(stage, layer_drop=True) for stage in (2, 3)),
        Case(3, recompute="checkpoint"),
        Case(3, recompute="none"),
    ],
}
# By number of processes: what is trained, and resumed in the middle.
RESUMED = {
    1: [],
    2: [
        *(MUON[1], MUON[3], ADAFACTOR[0], ADAFACTOR[2]),
        Case(2, groups=True, average="window"),
        Case(3, precision="bf16", optimizer="adafactor", groups=True),
    ],
}
# The same in the slow test.
SLOW = [
    Case(1, offload=True),
    *(Case(0, **{name: True}) for name in ("frozen", "shared", "layer_drop")),
    Case(2, recompute="checkpoint"),
    *MUON,
    *ADAFACTOR,
    *(Case(stage, groups=True, average="window") for stage in range(4)),
    *(Case(stage, precision="bf16", optimizer="muon", groups=True, average="exponential") for stage in range(4)),
    Case(2, precision="bf16", optimizer="adafactor"),
    *(Case(stage, offload=True, optimizer="muon", average="exponential") for stage in (2, 3)),
    *(Case(stage, offload=True, optimizer="adafactor") for stage in (1, 3)),
]
READ = {
    1: [*((Case(a), Case(b)) for a, b in ((3, 0), (3, 1), (0, 2), (1, 3))), (MUON[3], MUON[1])],
    2: [*((Case(a), Case(b)) for a, b in ((0, 1), (1, 2), (2, 0), (2, 3))), (ADAFACTOR[2], ADAFACTOR[3])],
}
SLOW_READ = [
    *((MUON[stage], MUON[3 - stage]) for stage in range(4)),
    *zip(ADAFACTOR, reversed(ADAFACTOR), strict=True),
]


def read_name(source: Case, case: Case) -> str:
    return f"{source.name}-read-at-{case.name}"


@dataclass
class Outcome:
    """Results of a case by step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    heldout: dict[str, float] = field(default_factory=dict)
    """Held-out loss by number of steps."""
    heldout_of_average: dict[str, float] = field(default_factory=dict)
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
