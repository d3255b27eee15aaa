"""Multi-query associative recall: LSH layers learn it with values of the next token, and do not without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reformer_dist import ModelConfig, ReformerLM
from reformer_dist.config import AttentionKind, Position

VOCAB, SEQ_LEN, N_PAIRS, STEPS = 256, 128, 16, 300
IGNORE_INDEX = -100

pytestmark = pytest.mark.slow


def recall_rows(n_rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [n_rows, SEQ_LEN]: pairs of key and value, then each key again, labelled by its value."""
    draw = torch.Generator().manual_seed(seed)
    keys = torch.stack([1 + torch.randperm(VOCAB // 2 - 1, generator=draw)[:N_PAIRS] for _ in range(n_rows)])
    values = torch.randint(VOCAB // 2, VOCAB, keys.shape, generator=draw)
    tokens = torch.zeros(n_rows, SEQ_LEN, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    pairs = torch.stack([keys, values], dim=2).flatten(1)
    tokens[:, : 2 * N_PAIRS] = pairs
    for row in range(n_rows):
        slots = torch.randperm((SEQ_LEN - 2 * N_PAIRS) // 2, generator=draw)[:N_PAIRS]
        at = 2 * N_PAIRS + 2 * slots
        tokens[row, at], labels[row, at] = keys[row], values[row]
    return tokens, labels


def trained_accuracy(next_value_heads: int, seed: int) -> float:
    """Fraction of held-out queries whose value is predicted, after STEPS steps of 32 rows."""
    config = ModelConfig(
        dim=64, n_layers=2, n_heads=2, layers=[AttentionKind.local, AttentionKind.lsh], local_window=8, n_hashes=4,
        n_buckets=8, window=16, next_value_heads=next_value_heads, position=Position.rotary,
    )  # fmt: skip
    model = ReformerLM(config, VOCAB, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    for step in range(STEPS):
        tokens, labels = recall_rows(32, seed=1000 * seed + step)
        loss = model(tokens, labels=labels, step=step) / (labels != IGNORE_INDEX).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
    tokens, labels = recall_rows(64, seed=-1 - seed)
    with torch.no_grad():
        predicted = model.eval()(tokens).argmax(-1)
    is_query = labels != IGNORE_INDEX
    return (predicted[is_query] == labels[is_query]).double().mean().item()


@pytest.mark.parametrize("seed", [0, 1])
def test_values_of_the_next_token_learn_recall(seed: int) -> None:
    assert trained_accuracy(next_value_heads=1, seed=seed) > 0.95


def test_values_of_the_same_token_do_not() -> None:
    """The contrast that makes the test above mean something."""
    assert trained_accuracy(next_value_heads=0, seed=0) < 0.1
