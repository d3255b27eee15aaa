"""The encoder-decoder, rows and settings that jobs of several ranks and the one process beside them share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_dist.config import (
    AttentionKind,
    CrossAttentionKind,
    DataConfig,
    DeepSpeedConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Recompute,
    RunConfig,
    TaskConfig,
    TaskKind,
    TrainerConfig,
)
from reformer_dist.models import ReformerEncoderDecoder

STEPS, ROWS, MICRO, VOCAB, IGNORE_INDEX = 3, 4, 1, 50, -100
SOURCE_LEN, TARGET_LEN = 47, 39  # no number of ranks here divides them
LEARNING_RATES = (0.01, 0.02, 0.01)


@dataclass(frozen=True)
class Case:
    """One way to train the same model on the same rows."""

    cross_attention: str = "exact"
    stage: int = 0
    heads: int = 1
    buckets: int = 1
    recompute: str = "reversible"

    @property
    def name(self) -> str:
        return f"{self.cross_attention}-zero{self.stage}-{self.heads}x{self.buckets}-{self.recompute}"

    def config(self) -> RunConfig:
        model = ModelConfig(
            dim=32,
            n_layers=2,
            n_heads=4,
            layers=[AttentionKind.local, AttentionKind.lsh],
            n_encoder_layers=2,
            encoder_layers=[AttentionKind.lsh, AttentionKind.exact],
            cross_attention=CrossAttentionKind[self.cross_attention],
            n_buckets=4,
            window=16,
            local_window=12,
            axial_shape=[8, 8],
            dropout=0.1,
            attention_dropout=0.0 if self.cross_attention == "exact" else 0.1,
            tie_embeddings=True,
            recompute=Recompute[self.recompute],
        )
        size = self.heads * self.buckets
        return RunConfig(
            model=model,
            task=TaskConfig(kind=TaskKind.sequence_to_sequence, max_source_len=SOURCE_LEN),
            data=DataConfig(seq_len=TARGET_LEN, batch_size=ROWS),
            deepspeed=DeepSpeedConfig(
                stage=self.stage, param_persistence_threshold=100, reduce_bucket_size=20_000
            ),
            # with the usual eps, Adam makes whole steps out of the rounding of gradients that are nearly 0
            optim=OptimConfig(grad_clip=0.4, eps=1e-5),
            parallel=ParallelConfig(sequence=size, heads=self.heads, buckets=self.buckets),
            trainer=TrainerConfig(micro_batch_size=MICRO),
        )

    def model(self) -> ReformerEncoderDecoder:
        return ReformerEncoderDecoder(self.config().model, VOCAB, seed=1)


def rows(step: int) -> dict[str, Tensor]:
    """The tensors of a step, texts of many lengths, padded behind."""
    draw = torch.Generator().manual_seed(step)
    source = torch.randint(0, VOCAB, (ROWS, SOURCE_LEN), generator=draw)
    target = torch.randint(0, VOCAB, (ROWS, TARGET_LEN + 1), generator=draw)
    source_mask, mask = (
        torch.arange(length) < torch.randint(length // 3, length + 1, (ROWS, 1), generator=draw)
        for length in (SOURCE_LEN, TARGET_LEN)
    )
    return {
        "source": source,
        "source_mask": source_mask,
        "tokens": target[:, :-1],
        "key_padding_mask": mask,
        "labels": target[:, 1:].masked_fill(~mask, IGNORE_INDEX),
        "rows": torch.arange(ROWS),
    }


# by number of processes; a single one holds whole sequences
CASES = {
    1: [Case("lsh", 0), Case("lsh", 1), Case("lsh", 2), Case("lsh", 3)],
    2: [
        *(Case("exact", stage) for stage in range(4)),
        Case("lsh", 0, 1, 2),
        Case("lsh", 3, 2, 1),
        Case("exact", 2, 2, 1),
        Case("exact", 3, 1, 2, "checkpoint"),
    ],
}
