"""On a GPU: fast path against the reference, reversible against plain layers, training end to end."""

from __future__ import annotations

import pytest
import torch
from support.launch import run_ranks
from support.tiny import tiny_overrides, write_tiny_dataset

from reformer_dist.config import AttentionKind, ModelConfig, Recompute
from reformer_dist.models import ReformerLM
from reformer_dist.ops.lsh import (
    AttentionOptions,
    ChunkRule,
    WindowRule,
    bucket_attention,
    draw_rotations,
    hash_vectors,
)
from reformer_dist.ops.lsh.reference import reference_attention

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("rule", [WindowRule(32, True), WindowRule(16, False), ChunkRule(16, True)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_fast_path_equals_reference(rule, dtype, tolerance, dropout):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 203, 32, device="cuda", dtype=dtype).requires_grad_() for _ in range(3))
    ids = torch.randint(0, 8, (2, 3, 4, 203), device="cuda")
    mask = torch.rand(2, 203, device="cuda") > 0.2
    settings = {"count_pairs_once": True, "dropout": dropout, "dropout_seed": 7}
    expected = reference_attention(q, k, v, ids, rule, scale=0.5, key_padding_mask=mask, **settings)
    actual = bucket_attention(q, k, v, ids, AttentionOptions(rule, 8, 0.5, **settings), mask)
    weight = torch.randn_like(actual)
    expected_grads = torch.autograd.grad(expected, (q, k, v), weight)
    actual_grads = torch.autograd.grad(actual, (q, k, v), weight)
    for a, b in zip((expected, *expected_grads), (actual, *actual_grads), strict=True):
        assert (a - b).float().abs().max() <= tolerance * max(1.0, float(a.float().abs().max()))


def test_buckets_equal_those_of_the_cpu():
    vectors = torch.randn(1, 4, 500, 64)
    rotations = draw_rotations(4, 64, 4, 64, "rotation", 0)
    on_cpu = hash_vectors(vectors, rotations, 64, "rotation")
    on_gpu = hash_vectors(vectors.cuda(), rotations, 64, "rotation").cpu()
    assert (on_cpu != on_gpu).float().mean() < 1e-3  # an argmax near a tie may differ


def test_strict_causality_is_bitwise():
    torch.manual_seed(0)
    config = ModelConfig(dim=64, n_heads=2, n_buckets=8, window=32, axial_shape=[16, 64])
    model = ReformerLM(config, 257).cuda().eval()
    tokens = torch.randint(0, 256, (1, 700), device="cuda")
    with torch.no_grad():
        before = model(tokens)
        for t in (1, 333, 699):
            edited = tokens.clone()
            edited[:, t:] = torch.randint_like(edited[:, t:], 256)
            assert torch.equal(model(edited)[:, :t], before[:, :t])


@pytest.mark.parametrize("autocast", [False, True])
def test_reversible_equals_plain(autocast):
    def gradients(recompute: Recompute) -> dict[str, torch.Tensor]:
        config = ModelConfig(
            dim=64,
            n_heads=2,
            layers=[AttentionKind.local, AttentionKind.lsh, AttentionKind.exact],
            n_layers=3,
            n_buckets=8,
            window=16,
            axial_shape=[16, 32],
            dropout=0.1,
            attention_dropout=0.1,
            recompute=recompute,
        )
        model = ReformerLM(config, 257, seed=3).cuda()
        tokens = torch.randint(0, 256, (2, 301), generator=torch.Generator().manual_seed(1)).cuda()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            loss = model(tokens[:, :-1], tokens[:, 1:], step=1, dropout_seed=2)
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, reversible = gradients(Recompute.none), gradients(Recompute.reversible)
    assert plain.keys() == reversible.keys()
    for name, grad in plain.items():
        error = (grad - reversible[name]).norm() / grad.norm()
        assert error < (3e-2 if autocast else 1e-4), name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_runs_and_resumes(tmp_path, precision):
    data = write_tiny_dataset(tmp_path / "data")
    stage = "zero1" if precision == "fp16" else "zero0"
    overrides = tiny_overrides(data, tmp_path / "run", f"trainer.precision={precision}", f"deepspeed={stage}")
    run_ranks("reformer_dist.train", 1, [*overrides, "trainer.max_steps=3"])
    assert "resuming from" in run_ranks("reformer_dist.train", 1, overrides)
