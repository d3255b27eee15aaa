"""A causal model with short convolutions over slices of documents against the whole, on every rank of a job."""

from __future__ import annotations

import torch
from slice_checks import check_training

from reformer_dist.config import AttentionKind, ModelConfig
from reformer_dist.distributed.mesh import make_mesh
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.models import ReformerLM
from reformer_dist.parallel import SlicedSequence
from reformer_dist.training.batches import IGNORE_INDEX, MicroBatch

VOCAB = 30


def run_convolutions(job: Runtime, heads: int, seq_len: int, shared_qk: bool) -> None:
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_buckets": 4, "window": 8, "axial_shape": [8, 8]}
    config = ModelConfig(**sizes, layers=[AttentionKind.lsh], qk_conv=4, shared_qk=shared_qk, next_value_heads=2)
    model, draw = ReformerLM(config, VOCAB), torch.Generator().manual_seed(seq_len)
    for name, weight in model.named_parameters():
        if name.endswith("_conv.weight"):
            torch.nn.init.normal_(weight, 0.0, 1.0, draw)
    tokens = torch.randint(0, VOCAB, (2, seq_len), generator=draw)
    documents = (torch.rand(2, seq_len, generator=draw) < 0.2).long().cumsum(dim=1)
    labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE_INDEX)], dim=1)
    whole = {"tokens": tokens, "labels": labels, "document_ids": documents}
    sequence = SlicedSequence(make_mesh(job, heads, job.world_size // heads), seq_len)
    check_training(model, model(**whole, step=0), MicroBatch.from_rows(whole, sequence), step=0)
