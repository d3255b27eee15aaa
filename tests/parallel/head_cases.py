"""Heads over slices of the sequence against the whole: loss and every gradient, checked on every rank of a job."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from reformer_dist.config import AttentionKind, ModelConfig, Pooling
from reformer_dist.distributed import runtime
from reformer_dist.distributed.grid import make_grid
from reformer_dist.models import ReformerForQuestionAnswering, ReformerForSequenceClassification
from reformer_dist.models.body import TokenModel
from reformer_dist.parallel import SlicedSequence

SEQ_LEN, VOCAB, N_CLASSES = 45, 20, 5  # four ranks do not divide it


def check(model: TokenModel, labels: Tensor, sequence: SlicedSequence, **masks: Tensor) -> None:
    tokens = torch.randint(0, VOCAB, (3, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    options = {"step": 0, "dropout_seed": 1}
    expected = model(tokens, labels, **options, **masks)
    expected.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    mine = {name: sequence.take(mask, False) for name, mask in masks.items()}
    loss = model(sequence.take(tokens, 0), labels, **options, **mine, sequence=sequence)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-6, atol=0)
    largest = max(grad.norm() for grad in grads)
    for (name, parameter), grad in zip(model.named_parameters(), grads, strict=True):
        dist.all_reduce(parameter.grad)
        assert (parameter.grad - grad).norm() <= 1e-5 * (grad.norm() + 0.1 * largest), name


def main() -> None:
    torch.set_num_threads(1)
    job = runtime.start()
    kinds = [AttentionKind.local, AttentionKind.lsh]
    real = torch.arange(SEQ_LEN) < torch.tensor([[SEQ_LEN], [30], [4]])
    answers = torch.tensor([[4, 40], [29, 29], [-100, -100]])
    for heads in (1, 2):
        sequence = SlicedSequence(make_grid(job, heads, job.world_size // heads), SEQ_LEN)
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "n_buckets": 4, "window": 8, "local_window": 8}
        config = ModelConfig(**sizes, layers=kinds, causal=False, dropout=0.1, axial_shape=[8, 8])
        for pooling in Pooling:
            config.pooling = pooling
            model = ReformerForSequenceClassification(config, VOCAB, N_CLASSES)
            check(model, torch.tensor([3, 0, 1]), sequence, key_padding_mask=real)
        answerable = real & (torch.arange(SEQ_LEN) >= 4)
        asked = ReformerForQuestionAnswering(config, VOCAB)
        check(asked, answers, sequence, key_padding_mask=real, answer_mask=answerable)
    job.barrier()
    runtime.stop()


if __name__ == "__main__":
    main()
