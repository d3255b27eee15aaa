"""The loss by position, on each rank of a job."""

from __future__ import annotations

import torch

from reformer_dist.config import ModelConfig, RunConfig
from reformer_dist.data import IGNORE_INDEX, Batch, ByteTokenizer
from reformer_dist.distributed.mesh import make_mesh
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.models import ReformerLM
from reformer_dist.parallel import SlicedSequence
from reformer_dist.tasks import Task, make_task
from reformer_dist.training.evaluation import evaluate

SEQ_LEN = 150  # no number of ranks divides it


def make_model() -> tuple[ReformerLM, Task, Batch]:
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "n_buckets": 4, "window": 8, "local_window": 8}
    config = RunConfig(model=ModelConfig(**sizes, layers=["local", "lsh"], position="rotary"))
    task = make_task(config, ByteTokenizer())
    tokens = torch.randint(0, 257, (3, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 257, (3, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    labels[1, 140:] = IGNORE_INDEX  # the end of the text
    return ReformerLM(config.model, 257).eval(), task, {"tokens": tokens, "labels": labels}


def run_positions(job: Runtime, heads: int) -> None:
    """Rows that ranks share have the loss of whole rows at every position."""
    model, task, rows = make_model()
    alone = SlicedSequence(make_mesh(job, 1, 1), SEQ_LEN)
    shared = SlicedSequence(make_mesh(job, heads, job.world_size // heads), SEQ_LEN)
    whole, sliced = (evaluate(model, [rows], task, job, each, by_position=True) for each in (alone, shared))
    assert [each.name for each in sliced.positions] == ["0-63", "64-127", "128-255"]
    assert [each.n_labels for each in sliced.positions] == [192, 192, 56]
    for a, b in zip(whole.positions, sliced.positions, strict=True):
        assert a.n_labels == job.world_size * b.n_labels  # each rank read the whole rows
        torch.testing.assert_close(b.loss, a.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(b.bits_per_byte, a.bits_per_byte, rtol=1e-5, atol=0)
