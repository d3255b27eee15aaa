"""Memory of the interpreter and its libraries: what a rank holds before and beside its tensors, measured here."""

from __future__ import annotations

import subprocess
import sys

from reformer_dist.planning.sizes import Job

# a rank whose tensors are next to nothing, after its first step; DeepSpeed imports as much as its stage needs
RANK = """
import resource, sys
from pathlib import Path
import torch
import reformer_dist.run.build
from reformer_dist.config import ModelConfig, Position, Precision, RunConfig
from reformer_dist.distributed import runtime
from reformer_dist.engine import TrainEngine
from reformer_dist.models import ReformerLM
from reformer_dist.models.block import Block

runtime.start()
torch.set_num_threads(1)
config = RunConfig(model=ModelConfig(dim=16, n_heads=2, n_layers=2, n_buckets=4, position=Position.rotary))
config.deepspeed.stage, config.trainer.precision = int(sys.argv[1]), Precision(sys.argv[2])
engine = TrainEngine(ReformerLM(config.model, 16), [Block], config, 1)
tokens = torch.zeros(1, 64, dtype=torch.int64)
for micro in range(engine.n_micro):
    engine.backward(engine.forward(tokens, tokens, step=0, dropout_seed=0), 64.0)
engine.step(lr=0.001)
print(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
"""


def measure_libraries(job: Job) -> float:
    """Bytes resident in a process that has trained a tiny model as the job would; 0 where they can't be read."""
    if sys.platform != "linux":
        return 0.0
    words = [str(job.config.deepspeed.stage), job.config.trainer.precision.value]
    done = subprocess.run(
        [sys.executable, "-c", RANK, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return float(done.stdout.split()[-1]) if done.returncode == 0 else 0.0
