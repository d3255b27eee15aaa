#!/usr/bin/env python3
"""Activation memory held between forward and backward, for 4 and for 16 layers.

Three values of model.recompute: reversible (activations are reconstructed), checkpoint (recomputed from each
layer's input) and none (stored). Exits 1 if the memory of the reversible model grows by 10 % or more from 4 to 16
layers.

Each row runs in its own process. The memory is the live memory after forward minus the live memory before it, with
parameters already allocated. On CUDA it is PyTorch's allocated memory. On a CPU it is the resident size, after
freed memory has been returned to the system (glibc's malloc_trim) before and after forward; the sizes are large
enough for the remaining allocator overhead to be negligible. A warm-up step on a short text excludes thread pools,
library buffers and the parameters' gradients.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from reformer_dist.config import ModelConfig, Recompute
from reformer_dist.models import ReformerLM

N_LAYERS = (4, 16)
MAX_GROWTH = 0.10
VOCAB_SIZE = 256
MIB = 2**20


def main() -> int:
    arguments = parse_arguments()
    if arguments.row is not None:
        recompute, n_layers = arguments.row
        print(json.dumps(measure(arguments, Recompute(recompute), int(n_layers))))
        return 0
    rows = [run_in_process(recompute, n_layers) for recompute in Recompute for n_layers in N_LAYERS]
    held = {(row["recompute"], row["n_layers"]): row["held_mib"] for row in rows}
    growth = {mode.value: held[mode.value, N_LAYERS[1]] / held[mode.value, N_LAYERS[0]] - 1 for mode in Recompute}
    if arguments.json:
        for row in rows:
            print(json.dumps(row))
    else:
        print_table(held, growth)
    return 0 if growth[Recompute.reversible.value] < MAX_GROWTH else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seq-len", type=int, default=4096, help="default: 4096")
    add("--batch", type=int, default=2, help="default: 2")
    add("--dim", type=int, default=256, help="default: 256")
    add("--n-hashes", type=int, default=2, help="hash rounds of the LSH layers (default: 2)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add("--json", action="store_true", help="print one JSON object per row instead of the table")
    add("--row", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_in_process(recompute: Recompute, n_layers: int) -> dict[str, Any]:
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        *sys.argv[1:],
        "--row",
        recompute.value,
        str(n_layers),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace, recompute: Recompute, n_layers: int) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    config = ModelConfig(
        dim=arguments.dim,
        n_layers=n_layers,
        n_hashes=arguments.n_hashes,
        n_buckets=max(1, arguments.seq_len // 64 // 2 * 2),
        axial_shape=[-(-arguments.seq_len // 64), 64],
        recompute=recompute,
    )
    model = ReformerLM(config, VOCAB_SIZE).to(arguments.device)
    tokens = torch.randint(0, VOCAB_SIZE, (arguments.batch, arguments.seq_len), device=arguments.device)
    short = tokens[:1, : min(64, arguments.seq_len)]
    model(short, short, step=0).backward()
    before = live_bytes(arguments.device)
    loss = model(tokens, tokens, step=0)
    held_mib = round((live_bytes(arguments.device) - before) / MIB, 2)
    del loss
    return {"recompute": recompute.value, "n_layers": n_layers, "held_mib": held_mib}


def live_bytes(device: str) -> int:
    """Bytes in use, after freed memory has been returned to the system."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    if sys.platform != "linux":
        raise SystemExit("bench_memory.py: live memory on a CPU can only be read on Linux")
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def print_table(held: dict[tuple[str, int], float], growth: dict[str, float]) -> None:
    line = "{:<12}{:>14}{:>14}{:>10}".format
    print(line("recompute", *(f"{n} layers" for n in N_LAYERS), "growth"))
    for mode in growth:
        print(line(mode, *(f"{held[mode, n]:.1f} MiB" for n in N_LAYERS), f"{growth[mode]:+.1%}"))


if __name__ == "__main__":
    sys.exit(main())
