"""A whole model on the kernels, hash included: loss and gradients equal those of plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reformer_dist.config import AttentionBackend, AttentionKind, ModelConfig
from reformer_dist.models import ReformerLM

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def loss_and_grads(backend: AttentionBackend) -> dict[str, Tensor]:
    config = ModelConfig(
        dim=32,
        n_heads=2,
        n_layers=2,
        layers=[AttentionKind.local, AttentionKind.lsh],
        n_hashes=2,
        n_buckets=4,
        window=9,
        local_window=9,
        local_round=True,
        axial_shape=[8, 8],
        attention_dropout=0.2,
        attention_backend=backend,
    )
    model = ReformerLM(config, 20, seed=3).to(DEVICE)
    tokens = torch.randint(0, 20, (2, 38), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    loss = model(tokens[:, :-1], labels=tokens[:, 1:], step=1, dropout_seed=2)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def test_loss_and_gradients():
    kernels, torch_ = (loss_and_grads(name) for name in (AttentionBackend.triton, AttentionBackend.torch))
    assert kernels.keys() == torch_.keys() and len(kernels) > 10
    for name, grad in torch_.items():
        torch.testing.assert_close(kernels[name], grad, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
