#!/usr/bin/env python3
"""Time and memory of attention, forward and backward: ours beside other Reformers and exact attention.

Every row runs in a process of its own, so its peak memory is its own. Correctness comes first, at a smaller
length: a row that fails its check shows no speed, and the tool exits 1.

ours             hash, sort and attention over q, v (k = q / |q|), held against the oracle, output and gradients
reformer_pytorch 1.4.4's LSHAttention on the same q, v, chunks of --window, seq_len / window buckets
transformers     4.57.6's LSHSelfAttention, its projections replaced by the given q, v; it picks its buckets itself
sdpa             PyTorch's exact causal attention, with k = q and the same v, held against a dense softmax

The two peers are optional: pip install 'reformer_dist[peers]'. They have no oracle: for them `correct` says only
that output and gradients are finite and have the right shape.

Peak memory: on a CPU the process's highest resident size less its size once modules are loaded and inputs exist;
on CUDA the most that PyTorch had allocated, less the inputs. Seconds: the best of --repeat after one warm-up.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reformer_dist.commands import SPIN_COUNT
from reformer_dist.ops.lsh import AttentionOptions, WindowRule, bucket_attention, draw_rotations, hash_vectors
from reformer_dist.ops.lsh.reference import reference_attention

PEERS = ("reformer_pytorch", "transformers")
IMPLEMENTATIONS = ("ours", *PEERS, "sdpa")
CHECK_SEQ_LEN = 512
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
IMPORT_FAILED = 3
MIB = 2**20

Attend = Callable[[Tensor, Tensor], Tensor]  # (q, v), each [1, H, S, D] -> an output of as many elements


@dataclass(frozen=True)
class Row:
    """What one process measures."""

    impl: str
    seq_len: int
    n_hashes: int
    heads: int
    head_dim: int
    window: int
    n_buckets: int | None
    dtype: str
    device: str
    repeat: int
    threads: int

    @property
    def buckets(self) -> int:
        """As many as make the mean bucket one window, rounded down to an even number."""
        return self.n_buckets or max(1, self.seq_len // self.window // 2 * 2)

    def inputs(self, seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, v (leaves) and the gradient of the output, [1, H, S, D]."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, self.heads, seq_len, self.head_dim)
        q, v, d_out = (
            torch.randn(shape, generator=generator).to(self.device, getattr(torch, self.dtype)) for _ in range(3)
        )
        return q.requires_grad_(), v.requires_grad_(), d_out


def main() -> int:
    arguments = parse_arguments()
    if arguments.row is not None:
        return run_row(Row(**json.loads(arguments.row)))
    rows = [found for row in wanted_rows(arguments) if (found := in_own_process(row)) is not None]
    if arguments.json:
        for row in rows:
            print(json.dumps(row))
    else:
        print_table(rows)
    return 0 if all(row["correct"] for row in rows) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seq-len", type=int, nargs="+", default=[16384], help="default: 16384")
    add("--n-hashes", type=int, nargs="+", default=[8], help="hash rounds (default: 8)")
    add("--heads", type=int, default=8, help="default: 8")
    add("--head-dim", type=int, default=64, help="default: 64")
    add("--window", type=int, default=64, help="ours: window; peers: chunk length (default: 64)")
    add("--n-buckets", type=int, help="ours (default: seq_len / window, so that the mean bucket is one window)")
    add("--dtype", choices=sorted(TOLERANCE), default="float32", help="default: float32")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--repeat", type=int, default=3, help="timed runs, of which the best counts (default: 3)")
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    add("--impl", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS, help="default: all")
    add("--json", action="store_true", help="print one JSON object a row instead of the table")
    add("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def wanted_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    missing = [name for name in PEERS if name in arguments.impl and importlib.util.find_spec(name) is None]
    if missing:
        note = "left out, not installed (pip install 'reformer_dist[peers]')"
        print(f"bench_attention.py: {' and '.join(missing)} {note}", file=sys.stderr)
    shared = {name: getattr(arguments, name) for name in Row.__dataclass_fields__}
    impls = [impl for impl in IMPLEMENTATIONS if impl in arguments.impl and impl not in missing]
    for seq_len, n_hashes, impl in itertools.product(arguments.seq_len, arguments.n_hashes, impls):
        yield Row(**{**shared, "seq_len": seq_len, "n_hashes": n_hashes, "impl": impl})


def in_own_process(row: Row) -> dict[str, Any] | None:
    """What the row's process printed; None where a peer is installed but can't be imported."""
    command = [sys.executable, str(Path(__file__).resolve()), "--row", json.dumps(asdict(row))]
    # threads of every row wait for one another as those of the installed commands do
    environment = {"GOMP_SPINCOUNT": SPIN_COUNT} | os.environ
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last_line = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
    if done.returncode == IMPORT_FAILED:
        print(f"bench_attention.py: {row.impl} left out: {last_line}", file=sys.stderr)
        return None
    print(f"bench_attention.py: {row.impl} failed: {last_line}", file=sys.stderr)
    return report(row, None, None, is_correct=False)


def report(row: Row, seconds: float | None, peak_mib: float | None, *, is_correct: bool) -> dict[str, Any]:
    sizes = {name: getattr(row, name) for name in ("impl", "seq_len", "n_hashes", "heads", "head_dim")}
    return {**sizes, "seconds": seconds, "peak_mib": peak_mib, "correct": is_correct}


def run_row(row: Row) -> int:
    torch.set_num_threads(row.threads)
    try:
        is_correct = check(row)
    except ImportError as error:
        print(error, file=sys.stderr)
        return IMPORT_FAILED
    seconds, peak_mib = measure(row) if is_correct else (None, None)
    print(json.dumps(report(row, seconds, peak_mib, is_correct=is_correct)))
    return 0


def run_once(attend: Attend, q: Tensor, v: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of q and v."""
    out = attend(q, v)
    dq, dv = torch.autograd.grad(out, (q, v), d_out.view(out.shape))
    return out, dq, dv


def measure(row: Row) -> tuple[float, float]:
    """Best seconds and peak MiB of forward and backward."""
    inputs = row.inputs(row.seq_len)
    attend = IMPLEMENTATION[row.impl](row, row.seq_len)
    is_cuda = row.device.startswith("cuda")
    before = torch.cuda.memory_allocated() if is_cuda else resident_bytes()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(1 + row.repeat):
        start = time.perf_counter()
        run_once(attend, *inputs)
        if is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if is_cuda else peak_resident_bytes()
    return round(min(times[1:]), 4), round(max(0, peak - before) / MIB, 1)


def resident_bytes() -> int:
    if sys.platform != "linux":
        return peak_resident_bytes()
    # what was freed is given back first, so that it counts when it is used again
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check(row: Row) -> bool:
    """Is what this implementation computes right, as far as that can be said? At a small length."""
    seq_len = min(row.seq_len, max(CHECK_SEQ_LEN, 2 * row.window))
    attend = IMPLEMENTATION[row.impl](row, seq_len)
    q, v, d_out = row.inputs(seq_len)
    found = run_once(attend, q, v, d_out)
    if row.impl in PEERS:
        return all(x.numel() == q.numel() and x.isfinite().all() for x in found)
    q, v = (x.detach().float().requires_grad_() for x in (q, v))
    exact = attend_by_oracle(row, q, v) if row.impl == "ours" else attend_densely(q, v)
    grads = torch.autograd.grad(exact, (q, v), d_out.float())
    tolerance = TOLERANCE[row.dtype]
    pairs = zip(found, (exact, *grads), strict=True)
    return all((x.float() - y).abs().max() <= tolerance * (1 + y.abs().max()) for x, y in pairs)


def ours(row: Row, seq_len: int) -> Attend:
    options = AttentionOptions(WindowRule(row.window, causal=True), row.buckets, scale=row.head_dim**-0.5)

    def attend(q: Tensor, v: Tensor) -> Tensor:
        return bucket_attention(q, None, v, our_buckets(row, q), options)

    return attend


def our_buckets(row: Row, q: Tensor) -> Tensor:
    rotations = draw_rotations(row.heads, row.head_dim, row.n_hashes, row.buckets, "rotation", seed=0)
    return hash_vectors(q, rotations, row.buckets, "rotation")


def attend_by_oracle(row: Row, q: Tensor, v: Tensor) -> Tensor:
    keys, rule = F.normalize(q, dim=-1), WindowRule(row.window, causal=True)
    return reference_attention(q, keys, v, our_buckets(row, q), rule, scale=row.head_dim**-0.5)


def reformer_pytorch(row: Row, seq_len: int) -> Attend:
    from reformer_pytorch.reformer_pytorch import LSHAttention

    layer = LSHAttention(bucket_size=row.window, n_hashes=row.n_hashes, causal=True).eval()
    return lambda q, v: layer(q.flatten(0, 1), v.flatten(0, 1))[0]


def transformers(row: Row, seq_len: int) -> Attend:
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = ReformerConfig(
        attention_head_size=row.head_dim,
        num_attention_heads=row.heads,
        lsh_attn_chunk_length=row.window,
        lsh_attention_probs_dropout_prob=0.0,
        num_hashes=row.n_hashes,
        max_position_embeddings=seq_len,
        is_decoder=True,
    )
    layer = LSHSelfAttention(config).to(row.device)
    hidden = torch.empty(1, seq_len, 0, device=row.device)  # read for its shape only
    del layer.query_key, layer.value

    def attend(q: Tensor, v: Tensor) -> Tensor:
        layer.query_key, layer.value = (lambda _, x=x: x.transpose(1, 2).flatten(2) for x in (q, v))
        return layer(hidden).hidden_states

    return attend


def sdpa(row: Row, seq_len: int) -> Attend:
    return lambda q, v: F.scaled_dot_product_attention(q, q, v, is_causal=True)


def attend_densely(q: Tensor, v: Tensor) -> Tensor:
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = q.shape[-1] ** -0.5 * q @ q.transpose(-1, -2)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


IMPLEMENTATION = {"ours": ours, "reformer_pytorch": reformer_pytorch, "transformers": transformers, "sdpa": sdpa}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows with their share of reformer_pytorch's time and memory at the same sizes."""
    line = "{:<18}{:>8}{:>8}{:>10}{:>10}{:>9}{:>9}  {}".format
    print(line("impl", "seq_len", "hashes", "seconds", "peak MiB", "time", "memory", "correct"))
    peer = {(row["seq_len"], row["n_hashes"]): row for row in rows if row["impl"] == "reformer_pytorch"}
    for row in rows:
        other = peer.get((row["seq_len"], row["n_hashes"]), {})
        n_hashes = "-" if row["impl"] == "sdpa" else row["n_hashes"]
        measured = ("-" if row[key] is None else row[key] for key in ("seconds", "peak_mib"))
        shares = (share(row, other, key) for key in ("seconds", "peak_mib"))
        print(line(row["impl"], row["seq_len"], n_hashes, *measured, *shares, "yes" if row["correct"] else "NO"))
    print("time, memory: divided by those of reformer_pytorch")


def share(row: dict[str, Any], other: dict[str, Any], key: str) -> str:
    return f"{row[key] / other[key]:.3f}" if row[key] and other.get(key) else "-"


if __name__ == "__main__":
    sys.exit(main())
