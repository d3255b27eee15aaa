#!/usr/bin/env python3
"""Peak memory of forward and backward, for one rank and for several that share the sequence.

Each row is a separate job. Counts memory beyond weights and gradients: activations, working memory of attention
and exchange buffers. On CUDA it is PyTorch's peak; on a CPU the largest resident size minus the size before the
step, after a warm-up step over a short sequence has created thread pools and gradients. Exits 1 if a mesh of 4
ranks or more needs above MAX_FRACTION of what one rank needs.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mesh_jobs import run_job

from reformer_dist.config import AttentionKind, ModelConfig, Position
from reformer_dist.distributed import runtime
from reformer_dist.distributed.mesh import make_mesh
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.models import ReformerLM
from reformer_dist.parallel import SlicedSequence

GRIDS = ["1x1", "4x1", "2x2", "1x4"]
MAX_FRACTION = 0.35
VOCAB_SIZE = 256
MIB = 2**20


def main() -> int:
    arguments = parse_arguments()
    if arguments.row is not None:
        job = runtime.start()
        row = measure(arguments, job)
        if job.is_main:
            print(json.dumps(row))
        runtime.stop()
        return 0
    rows = [run_job(__file__, mesh) for mesh in arguments.meshes]
    single = next((row["peak_mib"] for row in rows if row["ranks"] == 1), math.nan)
    for row in rows:
        row["share"] = row["peak_mib"] / single
        if arguments.json:
            print(json.dumps(row))
        else:
            print(
                f"{row['mesh']:>4}: {row['peak_mib']:>8.0f} MiB per rank, {row['share']:.3f} of a single rank, "
                f"{row['seconds']:.1f} s"
            )
    return 0 if all(row["share"] <= MAX_FRACTION for row in rows if row["ranks"] >= 4) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--meshes",
        nargs="+",
        default=GRIDS,
        metavar="HxB",
        help=f"meshes of heads x buckets (default: {' '.join(GRIDS)})",
    )
    add("--seq-len", type=int, default=131072, help="length of the whole sequence (default: 131072)")
    add("--dim", type=int, default=512, help="default: 512")
    add("--n-heads", type=int, default=16, help="default: 16")
    add("--n-layers", type=int, default=2, help="default: 2")
    add("--n-hashes", type=int, default=4, help="default: 4")
    add("--json", action="store_true", help="print one JSON object per row")
    add("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(arguments: argparse.Namespace, job: Runtime) -> dict[str, Any]:
    heads, buckets = map(int, arguments.row.split("x"))
    mesh = make_mesh(job, heads, buckets)
    model = build_model(arguments).to(job.device)
    step(model, SlicedSequence(mesh, 1024), job)
    before = live_memory(job)
    start = time.perf_counter()
    step(model, SlicedSequence(mesh, arguments.seq_len), job)
    seconds = time.perf_counter() - start
    peak = max(job.gather((peak_memory(job) - before) / MIB))
    return {
        "mesh": arguments.row,
        "ranks": mesh.size,
        "seq_len": arguments.seq_len,
        "peak_mib": peak,
        "seconds": seconds,
    }


def build_model(arguments: argparse.Namespace) -> ReformerLM:
    config = ModelConfig(
        dim=arguments.dim,
        n_layers=arguments.n_layers,
        n_heads=arguments.n_heads,
        layers=[AttentionKind.local, AttentionKind.lsh],
        n_hashes=arguments.n_hashes,
        n_buckets=max(2, arguments.seq_len // 64 // 2 * 2),
        ff_chunk=1024,
        position=Position.rotary,
    )
    return ReformerLM(config, VOCAB_SIZE)


def step(model: ReformerLM, sequence: SlicedSequence, job: Runtime) -> None:
    draw = torch.Generator().manual_seed(sequence.mesh.slice_index)
    tokens = torch.randint(0, VOCAB_SIZE, (1, sequence.n_local), generator=draw).to(job.device)
    mask = sequence.key_padding_mask(1, job.device)
    loss = model(tokens, tokens, key_padding_mask=mask, step=0, sequence=sequence)
    (loss / sequence.seq_len).backward()


def live_memory(job: Runtime) -> int:
    gc.collect()
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_memory(job: Runtime) -> int:
    if job.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
