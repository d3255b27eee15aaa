"""Trains every case of seq2seq_setup.py under DeepSpeed, as one rank of a job; writes losses, norms and weights.

python seq2seq_cases.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from seq2seq_setup import CASES, IGNORE_INDEX, LEARNING_RATES, MICRO, STEPS, Case, rows

from reformer_dist.checkpoint import AsyncSave, RunRecord
from reformer_dist.distributed import runtime
from reformer_dist.distributed.mesh import make_mesh
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.engine import TrainEngine
from reformer_dist.engine.fragments import parameter_shapes
from reformer_dist.models.block import Block
from reformer_dist.parallel import SlicedSequence
from reformer_dist.training.batches import MicroBatch


def train(job: Runtime, case: Case, out: Path) -> dict[str, list[float]]:
    model, config = case.model(), case.config()
    shapes = parameter_shapes(model)
    engine = TrainEngine(model, [Block], config, job.world_size)
    mesh = make_mesh(job, case.heads, case.buckets)
    sequence = SlicedSequence(mesh, config.data.seq_len)
    losses, norms = [], []
    for step in range(STEPS):
        whole = rows(step)
        own = {name: tensor.chunk(mesh.dp_size)[mesh.dp_rank] for name, tensor in whole.items()}
        valid = float((whole["labels"] != IGNORE_INDEX).sum())
        total = 0.0
        for first in range(0, len(own["labels"]), MICRO):
            batch = MicroBatch.from_rows({name: x[first : first + MICRO] for name, x in own.items()}, sequence)
            loss = engine.forward(**batch.tensors, **batch.sequences, step=step, dropout_seed=step)
            total += loss.item()
            engine.backward(loss, valid)
        norms.append(engine.step(LEARNING_RATES[step]).grad_norm)
        losses.append(job.sum([total])[0] / valid)
    fragments = engine.fragments()
    record = RunRecord(config={}, tokenizer={}, vocab_size=0, shapes=shapes)
    AsyncSave(job, out / case.name, STEPS, fragments, rank_state={}, record=record, extra_files={}).finish()
    engine.close()
    return {"losses": losses, "norms": norms, "sent": [mesh.stats.bytes_sent["heads"] / STEPS]}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    job = runtime.start()
    # stage 3 last: from its first engine on, DeepSpeed replaces torch's linear in the whole process
    cases = sorted(CASES[job.world_size], key=lambda case: case.stage)
    found = {case.name: train(job, case, out) for case in cases}
    if job.is_main:
        (out / "results.json").write_text(json.dumps(found))
    job.barrier()
    runtime.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
