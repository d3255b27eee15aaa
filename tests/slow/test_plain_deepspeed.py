"""A plain DeepSpeed loop at stage 3 on a model of the library, without our engine."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.jobs]

LOOP = """
import os, sys, torch
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
from reformer_dist.engine.setup import import_deepspeed
deepspeed = import_deepspeed()
from reformer_dist import Block, ModelConfig, ReformerLM
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
Block._z3_leaf = sys.argv[1] == "leaf"
config = ModelConfig(dim=32, n_layers=2, n_heads=2, n_buckets=4, window=8)
model, plain = ReformerLM(config, 50), ReformerLM(config, 50)
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
    config={
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    },
)
tokens = torch.arange(40).view(1, 40)
optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3)
for step in range(3):
    loss = engine(tokens[:, :-1], labels=tokens[:, 1:], step=step)
    engine.backward(loss)
    engine.step()
    expected = plain(tokens[:, :-1], labels=tokens[:, 1:], step=step)
    expected.backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
print("agreed")
"""


def run_loop(mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", LOOP, mode], capture_output=True, text=True, timeout=300)


def test_it_trains_like_plain_pytorch() -> None:
    done = run_loop("leaf")
    assert done.returncode == 0 and "agreed" in done.stdout, done.stderr


def test_layers_that_are_no_leaf_modules_are_refused() -> None:
    done = run_loop("parts")
    assert done.returncode != 0
    assert "ZeRO stage 3" in done.stderr and "set_z3_leaf_modules" in done.stderr
