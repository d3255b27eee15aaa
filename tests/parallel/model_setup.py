"""The model, rows and settings that jobs of several ranks and the one process beside them share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.config import (
    AttentionKind,
    DataConfig,
    DeepSpeedConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
    RunConfig,
    TrainerConfig,
)
from reformer_dist.models import ReformerLM

STEPS, ROWS, MICRO, VOCAB, IGNORE_INDEX = 5, 4, 1, 50, -100
LEARNING_RATES = (0.01, 0.02, 0.01, 0.005, 0.01)


@dataclass(frozen=True)
class Case:
    """One way to share the same rows among ranks."""

    stage: int = 0
    heads: int = 1
    buckets: int = 1
    seq_len: int = 90
    """No number of ranks here divides it."""
    precision: str = "fp32"
    layers: tuple[str, ...] = ("local", "lsh")
    shared_qk: bool = True

    @property
    def name(self) -> str:
        kind = "-".join(self.layers)
        own = "" if self.shared_qk else "-own-keys"
        return f"zero{self.stage}-{self.heads}x{self.buckets}-{self.seq_len}-{self.precision}-{kind}{own}"

    def config(self) -> RunConfig:
        model = ModelConfig(
            dim=32,
            n_layers=2,
            n_heads=4,
            head_dim=16,
            layers=[AttentionKind[kind] for kind in self.layers],
            n_buckets=8,
            window=16,
            next_value_heads=2 if "lsh" in self.layers else 0,
            qk_conv=3,
            shared_qk=self.shared_qk,
            local_window=24,
            axial_shape=[16, 16],
            ff_chunk=7,
            dropout=0.1,
            attention_dropout=0.1,
            ff_dropout=0.1,
        )
        zero = DeepSpeedConfig(stage=self.stage, param_persistence_threshold=100, reduce_bucket_size=20_000)
        size = self.heads * self.buckets
        return RunConfig(
            model=model,
            data=DataConfig(seq_len=self.seq_len, batch_size=ROWS),
            deepspeed=zero,
            # a norm that some steps exceed and some don't; with the usual eps, Adam makes whole steps out of the
            # rounding of gradients that are nearly 0
            optim=OptimConfig(grad_clip=0.4, eps=1e-5),
            parallel=ParallelConfig(sequence=size, heads=self.heads, buckets=self.buckets),
            trainer=TrainerConfig(micro_batch_size=MICRO, precision=Precision[self.precision]),
        )

    def model(self) -> ReformerLM:
        return ReformerLM(self.config().model, VOCAB, seed=1)


def rows(step: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels [4, seq_len] of a step; whole stretches of labels are ignored, so ranks' shares differ."""
    draw = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (ROWS, seq_len + 1), generator=draw)
    labels = tokens[:, 1:].clone()
    labels[torch.arange(seq_len) < torch.randint(0, seq_len, (ROWS, 1), generator=draw)] = IGNORE_INDEX
    return tokens[:, :-1], labels


# jobs: number of processes, what they train
JOBS = {
    "two": (
        2,
        [
            *(Case(stage, 1, 2) for stage in range(4)),
            Case(3, 2, 1, layers=("exact", "lsh")),
            Case(2, 1, 2, layers=("lsh",), shared_qk=False),
            Case(0, 1, 2, precision="bf16"),
            Case(3, 1, 2, precision="bf16"),
        ],
    ),
    # two sequences of two ranks; four ranks by buckets; by heads and buckets
    "four": (4, [Case(2, 1, 2), Case(3, 1, 4), Case(3, 2, 2)]),
    "four, every stage": (
        4,
        [
            *(Case(stage, 1, 2) for stage in (0, 1, 3)),
            *(Case(stage, 1, 4) for stage in (0, 1, 2)),
            *(Case(stage, 2, 2) for stage in (0, 1, 2)),
            Case(1, 4, 1, seq_len=96, layers=("exact", "local", "lsh")),
        ],
    ),
}
SLOW = {"four", "four, every stage"}
