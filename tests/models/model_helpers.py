"""Helpers: small models, random tokens, and gradients by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reformer_dist.config import AttentionKind, ModelConfig, Recompute
from reformer_dist.models import ReformerLM
from reformer_dist.models.short_conv import ShortConv

VOCAB = 50
LSH, LOCAL, EXACT = AttentionKind.lsh, AttentionKind.local, AttentionKind.exact
SMALL: dict[str, Any] = {
    "dim": 24,
    "n_layers": 4,
    "n_heads": 3,
    "n_hashes": 2,
    "n_buckets": 4,
    "window": 8,
    "chunk_len": 8,
    "local_window": 7,
    "axial_shape": [8, 16],
    "ff_mult": 2,
    "loss_chunk": 32,
}


def small_config(**changed: Any) -> ModelConfig:
    return ModelConfig(**{**SMALL, **changed})


def small_model(vocab_size: int = VOCAB, seed: int = 0, **changed: Any) -> ReformerLM:
    model = ReformerLM(small_config(**changed), vocab_size, seed)
    draw_convolutions(model)
    return model


@torch.no_grad()
def draw_convolutions(model: torch.nn.Module) -> None:
    """Short convolutions that are not the identity."""
    draw = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, ShortConv):
            torch.nn.init.normal_(module.weight, 0.0, 1.0, draw)


def with_recompute(model: ReformerLM, recompute: Recompute) -> ReformerLM:
    """A copy with the same weights and another recompute mode."""
    other = ReformerLM(dataclasses.replace(model.config, recompute=recompute), model.vocab_size, model.seed)
    other.load_state_dict(model.state_dict())
    for name, parameter in other.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    return other


def random_tokens(batch: int = 2, seq_len: int = 37, seed: int = 0, vocab_size: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def shifted(tokens: Tensor) -> Tensor:
    """Labels: the next token at each position; -100 at the last."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], dim=1)


def grads_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_grads_agree(model: torch.nn.Module, plain: torch.nn.Module, tolerance: float) -> None:
    found, expected = grads_of(model), grads_of(plain)
    assert found.keys() == expected.keys() and found
    # gradients that are zero up to rounding have no meaningful relative error
    largest = max(grad.norm().item() for grad in expected.values())
    for name in expected:
        error = (found[name] - expected[name]).norm().item()
        assert error <= tolerance * (expected[name].norm().item() + 0.01 * largest), f"{name} is off by {error}"


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def source_bytes() -> Tensor:
    """The source code of this package as one row of bytes."""
    package = Path(__file__).parents[2] / "reformer_dist"
    text = b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))
    return torch.tensor(list(text))


def train(model: ReformerLM, steps: int, seq_len: int, *, lr: float = 3e-3, batch: int = 2) -> list[float]:
    """Runs AdamW on the package's bytes; returns the loss in nats per token of each step."""
    data = source_bytes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    losses = []
    model.train()
    for step in range(steps):
        starts = torch.randint(0, data.numel() - seq_len, (batch,), generator=generator)
        tokens = torch.stack([data[start : start + seq_len] for start in starts.tolist()])
        loss = model(tokens, shifted(tokens), step=step, dropout_seed=step) / (batch * (seq_len - 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
