"""Cases of test_fsdp.py, run on each rank: models under torch's FSDP2 (`fully_shard`)."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from reformer_dist import Block, LSHSelfAttention, ModelConfig, ReformerLM
from reformer_dist.distributed.runtime import Runtime

SIZES = {"dim": 24, "n_layers": 4, "n_heads": 3, "n_hashes": 2, "n_buckets": 4, "window": 8, "local_window": 7}
TOKENS = torch.arange(2 * 40).view(2, 40) * 7 % 50


def build(recompute: str) -> ReformerLM:
    return ReformerLM(ModelConfig(**SIZES, recompute=recompute, dropout=0.1), 50)


def loss_of(model: ReformerLM) -> torch.Tensor:
    return model(TOKENS[:, :-1], labels=TOKENS[:, 1:], step=2, dropout_seed=3)


def shard(model: ReformerLM, sharded: type, **options: object) -> ReformerLM:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in model.stack.modules():
        if isinstance(module, sharded):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def gradients_are_those_of_one_process(runtime: Runtime, recompute: str, sharded: str) -> None:
    """Two accumulated backward passes, and two forwards before a backward."""
    plain = build("none")
    model = shard(build(recompute), {"Block": Block, "LSHSelfAttention": LSHSelfAttention}[sharded])
    for each in (plain, model):
        loss_of(each).backward()
        (loss_of(each) + loss_of(each)).backward()
    for (name, expected), found in zip(plain.named_parameters(), model.parameters(), strict=True):
        grad = found.grad.full_tensor()
        assert (grad - expected.grad).norm() <= 1e-5 * (expected.grad.norm() + 1), name


def sublayers_are_refused(runtime: Runtime) -> None:
    model = shard(build("reversible"), LSHSelfAttention)
    with pytest.raises(RuntimeError, match=r"FSDP.*attention.*Block.*model\.recompute=none"):
        loss_of(model)


def cast_streams_are_refused(runtime: Runtime) -> None:
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"cast_forward_inputs=False"):
        loss_of(shard(build("reversible"), Block, mp_policy=half))
    kept = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    model = shard(build("reversible"), Block, mp_policy=kept)
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters())
