"""Trains every case of model_setup.py under DeepSpeed, as one rank of a job; writes losses, norms and weights.

python model_cases.py JOB OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from model_setup import IGNORE_INDEX, JOBS, LEARNING_RATES, MICRO, STEPS, Case, rows

from reformer_dist.checkpoint import AsyncSave, RunRecord
from reformer_dist.distributed import runtime
from reformer_dist.distributed.mesh import make_mesh
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.engine import TrainEngine
from reformer_dist.engine.fragments import parameter_shapes
from reformer_dist.models.block import Block
from reformer_dist.parallel import SlicedSequence


def train(job: Runtime, case: Case, out: Path) -> dict[str, list[float]]:
    model = case.model()
    shapes = parameter_shapes(model)
    engine = TrainEngine(model, [Block], case.config(), job.world_size)
    mesh = make_mesh(job, case.heads, case.buckets)
    sequence = SlicedSequence(mesh, case.seq_len)
    mask = sequence.key_padding_mask(MICRO, job.device)
    losses, norms = [], []
    for step in range(STEPS):
        inputs, labels = (x.chunk(mesh.dp_size)[mesh.dp_rank] for x in rows(step, case.seq_len))
        inputs, labels = sequence.take(inputs, 0), sequence.take(labels, IGNORE_INDEX)
        valid = job.sum([float((labels != IGNORE_INDEX).sum())])[0]
        total = 0.0
        for first in range(0, len(inputs), MICRO):
            micro = slice(first, first + MICRO)
            loss = engine.forward(
                inputs[micro],
                labels[micro],
                key_padding_mask=mask,
                step=step,
                dropout_seed=step,
                rows=torch.arange(MICRO) + mesh.dp_rank * len(inputs) + first,
                sequence=sequence,
            )
            total += loss.item()
            engine.backward(loss, valid)
        norms.append(engine.step(LEARNING_RATES[step]).grad_norm)
        losses.append(job.sum([total])[0] / valid)
    AsyncSave(
        job,
        out / case.name,
        STEPS,
        engine.fragments(),
        rank_state={},
        record=RunRecord(config={}, tokenizer={}, vocab_size=0, shapes=shapes),
        extra_files={},
    ).finish()
    engine.close()
    return {"losses": losses, "norms": norms}


def main(name: str, out: Path) -> None:
    torch.set_num_threads(1)
    job = runtime.start()
    found = {case.name: train(job, case, out) for case in JOBS[name][1]}
    if job.is_main:
        (out / "results.json").write_text(json.dumps(found))
    job.barrier()
    runtime.stop()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
