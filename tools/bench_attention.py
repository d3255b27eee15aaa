#!/usr/bin/env python3
"""Time and memory of attention, forward and backward: ours beside other Reformers and exact attention.

Every row runs in a process of its own, so its peak memory is its own. Correctness comes first, at a smaller
length with buckets as full: a row that fails its check shows no speed, and the tool exits 1. A row that could not
run, out of memory for one, is neither right nor wrong: it says why, and the tool exits 2.

ours             hash, sort and attention over q, v (k = q / |q|), held against the oracle, output and gradients
ours_torch       the same in plain PyTorch, as it runs where there is no C compiler (CPU)
reformer_pytorch 1.4.4's LSHAttention on the same q, v, chunks of --window, seq_len / window buckets
transformers     4.57.6's LSHSelfAttention on the same q, v in place of its projections, chunks of --window, as
                 many buckets as ours
transformers_own the same with the buckets that it derives where num_buckets is not given: at 16384 tokens 512, as
                 two factors
sdpa             PyTorch's exact causal attention as it chooses itself, with k = q, held against a dense softmax
flash, cudnn     the same by one of its kernels (CUDA)
flex             PyTorch's FlexAttention over as many tokens back as ours meets keys in its rounds on average,
                 held against a dense softmax (CUDA)

All rows are as in training: gradients, no dropout, no projections, and no recompute of a reversible layer around
them. The peers are optional: pip install 'reformer_dist[peers]'. They have no oracle: for them `correct` says
only that output and gradients are finite and have the right shape.

Peak memory: on a CPU the process's highest resident size less its size once modules are loaded and inputs exist;
on CUDA the most that PyTorch had allocated, less the inputs. Seconds: the best of --repeat runs, of which the
first also warms up. hash and sort, part of ours, are timed by themselves too. replayed (CUDA): seconds of the
same work from a CUDA graph, so without the host's part, which is most of the time of short texts. keys
(of ours, with --json): how many a token meets in a round, on average.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from attention_cases import (
    CPU_ONLY,
    CUDA_ONLY,
    EXACT,
    IMPLEMENTATION,
    IMPLEMENTATIONS,
    OURS,
    PEERS,
    TOLERANCE,
    BenchCase,
    check,
    mean_visible_keys,
    hash_buckets,
    our_options,
    run_once,
)
from torch import Tensor

from reformer_dist.commands import SPIN_COUNT
from reformer_dist.ops.lsh.attention import Shard
from reformer_dist.ops.lsh.backends import backend_for

MEASURES = ("seconds", "forward", "backward", "replayed", "hash", "sort", "peak_mib")
VERDICT = {True: "yes", False: "NO", None: "did not run"}
LONGEST_REPLAY = 0.5  # seconds; behind them, what the host adds is lost in the rest
IMPORT_FAILED = 3
MIB = 2**20


def main() -> int:
    arguments = parse_arguments()
    if arguments.row is not None:
        return run_row(BenchCase(**json.loads(arguments.row)))
    if arguments.rows is not None:
        return run_rows([BenchCase(**row) for row in json.loads(arguments.rows)])
    rows = [found for row in wanted_rows(arguments) if (found := in_own_process(row)) is not None]
    if arguments.json:
        for row in rows:
            print(json.dumps(row))
    else:
        print_table(rows)
    if arguments.plot is not None:
        plot(rows, arguments.plot)
    return exit_status(rows)


def exit_status(rows: list[dict[str, Any]]) -> int:
    """1 where a result is wrong, 2 where none is but a row could not run."""
    found = [row["correct"] for row in rows]
    return 1 if False in found else 2 if None in found else 0


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
    add("--repeat", type=int, default=4, help="timed runs, of which the best counts (default: 4)")
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    add("--impl", nargs="+", choices=IMPLEMENTATIONS, help="default: all that the device can run")
    add("--plot", type=Path, metavar="PNG", help="draw seconds over lengths (needs matplotlib)")
    add("--json", action="store_true", help="print one JSON object a row instead of the table")
    add("--row", help=argparse.SUPPRESS)
    add("--rows", help=argparse.SUPPRESS)
    return parser.parse_args()


def wanted_rows(arguments: argparse.Namespace) -> Iterator[BenchCase]:
    is_cuda = arguments.device.startswith("cuda")
    others = CPU_ONLY if is_cuda else CUDA_ONLY
    wanted = arguments.impl or [name for name in IMPLEMENTATIONS if name not in others]
    missing = [
        row for row, package in PEERS.items() if row in wanted and importlib.util.find_spec(package) is None
    ]
    if missing:
        note = "left out, not installed (pip install 'reformer_dist[peers]')"
        print(f"bench_attention.py: {' and '.join(missing)} {note}", file=sys.stderr)
    shared = {name: getattr(arguments, name) for name in BenchCase.__dataclass_fields__}
    impls = [impl for impl in IMPLEMENTATIONS if impl in wanted and impl not in missing]
    for seq_len, n_hashes, impl in itertools.product(arguments.seq_len, arguments.n_hashes, impls):
        yield BenchCase(**{**shared, "seq_len": seq_len, "n_hashes": n_hashes, "impl": impl})


def in_own_process(row: BenchCase) -> dict[str, Any] | None:
    """What the row's process printed; None where a peer is installed but can't be imported."""
    command = [sys.executable, str(Path(__file__).resolve()), "--row", json.dumps(asdict(row))]
    # threads of every row wait for one another as those of the installed commands do
    environment = {"GOMP_SPINCOUNT": SPIN_COUNT} | os.environ
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    why = last_line(done.stderr) or f"exit status {done.returncode}"
    if done.returncode == IMPORT_FAILED:
        print(f"bench_attention.py: {row.impl} left out: {why}", file=sys.stderr)
        return None
    print(f"bench_attention.py: {row.impl} failed: {why}", file=sys.stderr)
    return report(row, None, why)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def report(row: BenchCase, measured: dict[str, float | None] | None, error: str | None = None) -> dict[str, Any]:
    """A row as it is printed: without measures it was wrong, or, with an error, it could not run."""
    sizes = {name: getattr(row, name) for name in ("impl", "seq_len", "n_hashes", "heads", "head_dim", "dtype")}
    verdict = {"correct": measured is not None} if error is None else {"correct": None, "error": error}
    return {**sizes, **(measured or dict.fromkeys((*MEASURES, "keys"))), **verdict}


def run_row(row: BenchCase) -> int:
    torch.set_num_threads(row.threads)
    try:
        is_correct = check(row.shortened())
    except ImportError as error:
        print(error, file=sys.stderr)
        return IMPORT_FAILED
    print(json.dumps(report(row, measure(row) if is_correct else None)))
    return 0


def run_rows(rows: list[BenchCase]) -> int:
    """One after another in this process, each told of as soon as it is there: for gpu_report.py.

    On CUDA a row's memory is counted by PyTorch, and a process of its own would cost it seconds. Rows of other
    lengths are alike once they are shortened: each kind is checked once.
    """
    is_correct_for = functools.cache(check)
    for row in rows:
        torch.set_num_threads(row.threads)
        try:
            found = report(row, measure(row) if is_correct_for(row.shortened()) else None)
        except Exception as error:  # Triton's are of no class of their own that could be named here
            found = report(row, None, describe_error(error))
        print(json.dumps(found), flush=True)
        if found["correct"] is None and not is_usable(row.device):
            break  # the rows behind it are for another process
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return 0


def describe_error(error: Exception) -> str:
    """Its type, and the first line of what it says, if it says anything."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def is_usable(device: str) -> bool:
    """False once a kernel wrote where it must not: from then on CUDA refuses all that the process asks for."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        return False
    return True


def measure(row: BenchCase) -> dict[str, float | None]:
    """Seconds and MiB by the names of MEASURES, and keys; hash, sort and keys are None where there are none."""
    q, v, d_out = row.inputs()
    attend = IMPLEMENTATION[row.impl](row)
    is_cuda = row.device.startswith("cuda")
    before = torch.cuda.memory_allocated() if is_cuda else resident_bytes()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()
    runs = []
    for _ in range(row.repeat):
        out, forward = timed(row, lambda: attend(q, v))
        _, backward = timed(row, lambda out=out: torch.autograd.grad(out, (q, v), d_out.view(out.shape)))
        runs.append((forward + backward, forward, backward))
        del out
    peak = torch.cuda.max_memory_allocated() if is_cuda else peak_resident_bytes()
    best = min(runs)
    replayed = replay(row, lambda: run_once(attend, q, v, d_out)) if is_cuda and best[0] < LONGEST_REPLAY else None
    values = [
        *(round(seconds, 5) for seconds in best),
        replayed,
        *split(row, q),
        round(max(0, peak - before) / MIB, 1),
    ]
    keys = round(mean_visible_keys(row, hash_buckets(row, q)), 2) if row.impl in OURS else None
    return {**dict(zip(MEASURES, values, strict=True)), "keys": keys}


def timed(row: BenchCase, work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    found = work()
    if row.device.startswith("cuda"):
        torch.cuda.synchronize()
    return found, time.perf_counter() - start


def replay(row: BenchCase, work: Callable[[], Any]) -> float | None:
    """Seconds of the work from a CUDA graph, the best of batches of 5; None where it can't be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        return None
    batches = [timed(row, lambda: [graph.replay() for _ in range(5)])[1] for _ in range(row.repeat)]
    return round(min(batches) / 5, 6)


def split(row: BenchCase, q: Tensor) -> tuple[float | None, float | None]:
    """Seconds of hashing and of laying out the order, of ours on a CPU."""
    if row.impl not in OURS:
        return None, None
    hashed = [timed(row, lambda: hash_buckets(row, q)) for _ in range(row.repeat)]
    hash_seconds = round(min(seconds for _, seconds in hashed), 5)
    if row.device.startswith("cuda"):
        return hash_seconds, None  # there the order is made inside the kernels' launch
    units = hashed[0][0].flatten(0, 1)
    options = our_options(row)
    backend = backend_for(options, q)(options, q)
    shards = [Shard(unit, row.buckets, torch.arange(1), row.seq_len) for unit in units.split(1)]
    sorts = [timed(row, lambda: [backend.sort(shard) for shard in shards]) for _ in range(row.repeat)]
    return hash_seconds, round(min(seconds for _, seconds in sorts), 5)


def resident_bytes() -> int:
    if sys.platform != "linux":
        return peak_resident_bytes()
    # what was freed is given back first, so that it counts when it is used again
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def reset_peak() -> None:
    """From here on, on Linux, the highest resident size counts anew: what the check needed is not the row's."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows with how many times ours is faster and smaller at the same sizes."""
    heads = (
        "seconds",
        "forward",
        "backward",
        "replayed",
        "hash",
        "sort",
        "us/token",
        "peak MiB",
        "time",
        "memory",
    )
    line = ("{:<18}{:>9}{:>7}" + "{:>10}" * len(heads) + "  {}").format
    print(line("impl", "seq_len", "hashes", *heads, "correct"))
    ours_at = {(row["seq_len"], row["n_hashes"]): row for row in rows if row["impl"] == "ours"}
    for row in rows:
        own = ours_at.get((row["seq_len"], row["n_hashes"]), {})
        per_token = round(row["seconds"] / row["seq_len"] * 1e6, 1) if row["seconds"] else None
        *seconds, peak = (row[key] for key in MEASURES)
        cells = [*seconds, per_token, peak, ratio(row, own, "seconds"), ratio(row, own, "peak_mib")]
        n_hashes = "-" if row["impl"] in EXACT else row["n_hashes"]
        shown = ("-" if cell is None else cell for cell in cells)
        print(line(row["impl"], row["seq_len"], n_hashes, *shown, VERDICT[row["correct"]]))
    print("time, memory: divided by those of ours at the same length and rounds")


def ratio(row: dict[str, Any], own: dict[str, Any], key: str) -> str | None:
    return f"{row[key] / own[key]:.2f}" if row[key] and own.get(key) else None


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds over lengths, a line for each implementation and number of rounds."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("bench_attention.py: --plot needs matplotlib: pip install matplotlib")
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["correct"]:
            name = row["impl"] if row["impl"] in EXACT else f"{row['impl']}, {row['n_hashes']} rounds"
            lines.setdefault(name, []).append((row["seq_len"], row["seconds"]))
    for name, points in lines.items():
        axes.loglog(*zip(*sorted(set(points)), strict=True), marker="o", label=name, base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("seconds, forward and backward")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
