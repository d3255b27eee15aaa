#!/usr/bin/env python3
"""Compares the peak memory of training runs with the estimate of `reformer-train --dry-run`.

Exits 1 if an estimate is off by more than 10 %. Each row is a separate job with the real trainer and engine, two
or three steps long, on a small generated dataset. On a CPU the peak is the largest resident size of any rank
(ru_maxrss), which includes the interpreter and its libraries. Their memory is measured in a separate process, and
`tensors` is planned tensors / (measured - libraries). On CUDA the peak is PyTorch's allocated memory.

The estimate counts live tensors, but glibc retains much freed memory: its mmap threshold, above which freed
allocations are returned to the system, adapts up to 32 MiB. The jobs fix it at 1 MiB (MALLOC_MMAP_THRESHOLD_), so
that the resident size is the live memory. --default-allocator keeps glibc's default and shows the memory of a run
without that setting; the tool then exits 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from reformer_dist.config import RunConfig
from reformer_dist.data import ByteTokenizer, Corpus, RawSample, write_dataset, write_samples
from reformer_dist.distributed import runtime
from reformer_dist.planning import JobSpec, make_plan
from reformer_dist.run.build import build_trainer
from reformer_dist.run.compose import compose_run
from reformer_dist.tasks import Task, make_task
from reformer_dist.training.metrics import peak_memory_gib

MAX_ERROR = 0.10
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
BASE = [
    *("model.dim=256", "model.n_heads=4", "model.n_layers=2", "model.n_hashes=2", "model.n_buckets=256"),
    *("model.window=64", "model.local_window=128", "data.seq_len=16384", "data.batch_size=1"),
    *("trainer.max_steps=2", "trainer.log_every=0", "trainer.eval_every=0", "trainer.sample_every=0"),
    "trainer.save_every=0",
]
DEEP = ["model.dim=512", "model.n_heads=8", "model.n_layers=8", "model.n_buckets=32", "data.seq_len=1024"]
SHORT = [*DEEP, "data.seq_len=128"]  # bf16 products are slow on cores without bf16 instructions
LONG = ["data.seq_len=32768", "model.n_buckets=512"]
PAIRS = ["task.kind=sequence_to_sequence", "data.seq_len=8192", "task.max_source_len=8192"]
ROWS: dict[str, tuple[int, list[str]]] = {
    "2 layers": (1, []),
    "6 layers": (1, ["model.n_layers=6"]),
    "32768 tokens": (1, LONG),
    "no recompute": (1, ["model.recompute=none", "data.seq_len=8192"]),
    "checkpointing": (1, ["model.recompute=checkpoint", "model.n_layers=3"]),
    "bf16": (1, ["trainer.precision=bf16"]),
    "exact": (1, ["model.layers=[exact]", "data.seq_len=2048", "data.batch_size=8"]),
    "encoder-decoder": (1, PAIRS),
    "encoder-decoder, LSH": (1, [*PAIRS, "model.cross_attention=lsh"]),
    "save at each step": (1, [*DEEP, "trainer.save_every=1"]),
    "ZeRO 1": (2, [*DEEP, "deepspeed=zero1", "data.batch_size=2"]),
    "ZeRO 2, bf16": (2, [*SHORT, "deepspeed=zero2", "data.batch_size=4", "trainer.precision=bf16"]),
    "ZeRO 3": (2, [*DEEP, "deepspeed=zero3", "data.batch_size=2"]),
    "heads 2": (2, [*LONG, "parallel.sequence=2", "parallel.heads=2"]),
    "buckets 2": (2, [*LONG, "parallel.sequence=2", "parallel.buckets=2"]),
    "buckets 4, ZeRO 1": (4, [*LONG, "parallel.sequence=4", "parallel.buckets=4", "deepspeed=zero1"]),
}


COLUMNS = (
    "job",
    "ranks",
    "planned",
    "measured, MiB",
    "libraries",
    "planned / measured",
    "tensors",
    "peak at",
)


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.row is not None:
            print(json.dumps(measure(arguments.row, Path(arguments.data))))
            return 0
        write_text(Path(folder))
        names = arguments.rows or list(ROWS)
        # for the jobs, and for the processes that measure libraries
        os.environ.update({"OMP_NUM_THREADS": "1"} | ({} if arguments.default_allocator else ALLOCATOR))
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        errors = [abs(compare(name, folder) - 1) for name in names]
    print(f"largest error: {max(errors):.1%}")
    return 0 if arguments.default_allocator or max(errors) <= MAX_ERROR else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), metavar="NAME", help=f"default: all of {', '.join(ROWS)}"
    )
    parser.add_argument(
        "--default-allocator", action="store_true", help="keep glibc's default settings; always exits 0"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_text(folder: Path) -> None:
    """Writes a language model dataset and one of pairs; each document is longer than a row."""
    text = b"".join(b"%d is a number, and the next one is %d.\n" % (n, n + 1) for n in range(1000))
    documents = [(f"document{i}", text) for i in range(50)]
    write_dataset(documents, folder / "data", ByteTokenizer(), shard_bytes=10**6, heldout_fraction=0.0)
    pairs = [RawSample(name, (text, text)) for name, text in documents]
    write_samples(pairs, folder / "pairs", ByteTokenizer(), heldout_fraction=0.0, fields=("source", "target"))


def compare(name: str, folder: str) -> float:
    """Runs a job and prints its row of the table; returns planned / measured."""
    n_ranks, _ = ROWS[name]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"] if n_ranks > 1 else []
    command = [sys.executable, *launch, str(Path(__file__).resolve()), "--row", name, "--data", folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the job of row {name} exited with status {done.returncode}")
    result: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    config = configure(name, Path(folder))
    task = task_of(config)
    plan = make_plan(JobSpec(config, n_ranks, n_ranks, task.vocab_size, result["device"]), task.build_model)
    measured, planned = max(result["peaks"]), plan.total
    tensor_ratio = plan.peak.total / (measured - plan.libraries)
    sizes = [f"{amount / 2**20:.0f}" for amount in (planned, measured, plan.libraries)]
    ratios = [f"{ratio:.3f}" for ratio in (planned / measured, tensor_ratio)]
    print(f"| {' | '.join([name, str(n_ranks), *sizes, *ratios, plan.peak.name])} |", flush=True)
    return planned / measured


def configure(name: str, folder: Path) -> RunConfig:
    data = folder / ("pairs" if "task.kind=sequence_to_sequence" in ROWS[name][1] else "data")
    paths = [f"data.path={data}", f"output_dir={folder / name.replace(' ', '-').replace(',', '')}"]
    return compose_run([*BASE, *ROWS[name][1], *paths])


def task_of(config: RunConfig) -> Task:
    return make_task(config, Corpus.open(config.data.paths()).tokenizer)


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Trains, and returns the peak memory of all ranks in bytes."""
    job = runtime.start()
    if job.device.type == "cpu":
        torch.set_num_threads(1)
    with ExitStack() as resources:
        trainer = build_trainer(configure(name, folder), job, resources)
        trainer.fit()
        peaks = job.gather(peak_memory_gib(job.device) * 2**30)
    runtime.stop()
    if not job.is_main:
        sys.exit(0)
    return {"peaks": peaks, "device": job.device.type}


if __name__ == "__main__":
    sys.exit(main())
