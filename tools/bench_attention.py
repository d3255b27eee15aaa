#!/usr/bin/env python3
"""Time and memory of attention in forward and backward, compared with other Reformers and exact attention.

Each row runs in its own process, so that peak memory is measured per row. Results are checked first, at a shorter
length with the same mean bucket size: an incorrect row shows no speed, and the tool exits 1. A row that could not
run (out of memory, for example) is neither correct nor incorrect: it reports the error, and the tool exits 2.

ours             hash, sort and attention over q, v (k = q / |q|), checked against the reference with gradients
ours_torch       the same in plain PyTorch, the fallback without a C compiler (CPU)
own_keys         as ours, with keys of their own (model.shared_qk=false), which are the queries of another head
reformer_pytorch 1.4.4's LSHAttention on the same q, v, with chunks of --window and seq_len / window buckets
transformers     4.57.6's LSHSelfAttention on the same q, v in place of its projections, with chunks of --window
                 and the same number of buckets as ours
transformers_own the same with the number of buckets that it derives without num_buckets: at 16384 tokens 512, as
                 two factors
sdpa             PyTorch's exact causal attention, default kernel, with k = q; checked against a dense softmax
flash, cudnn     the same with one kernel (CUDA)
flex             PyTorch's FlexAttention with a causal window of as many keys as a token of ours attends to in all
                 rounds on average; checked against a dense softmax (CUDA)

All rows run in training mode: with gradients, without dropout, projections, or the recompute of a reversible
layer. The peers are optional: pip install 'reformer_dist[peers]'. They have no reference: for them `correct` only
means that output and gradients are finite and have the right shape.

Peak memory: on a CPU the largest resident size minus the size after loading modules and creating inputs; on CUDA
PyTorch's peak allocated memory minus the inputs. Seconds: the best of --repeat runs, including the first, which
warms up. hash and sort, which are part of ours, are also timed separately. replayed (CUDA): seconds of the same
work as a CUDA graph, without the host overhead that dominates short sequences. keys (ours, with --json): mean
number of keys that a token attends to per round.
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
    OWN_KEYS,
    PEERS,
    TOLERANCE,
    BenchCase,
    check,
    hash_buckets,
    mean_visible_keys,
    our_options,
    run_once,
)
from torch import Tensor

from reformer_dist.ops.lsh.attention import Shard
from reformer_dist.ops.lsh.backends import backend_for
from reformer_dist.ops.spinning import SPIN_COUNT

MEASURES = ("seconds", "forward", "backward", "replayed", "hash", "sort", "peak_mib")
VERDICT = {True: "yes", False: "NO", None: "did not run"}
MAX_REPLAY_SECONDS = 0.5  # above, host overhead is negligible
IMPORT_FAILED = 3
MIB = 2**20


def main() -> int:
    arguments = parse_arguments()
    if arguments.row is not None:
        return run_row(BenchCase(**json.loads(arguments.row)))
    if arguments.rows is not None:
        return run_rows([BenchCase(**row) for row in json.loads(arguments.rows)])
    rows = [result for row in requested_cases(arguments) if (result := run_in_process(row)) is not None]
    if arguments.json:
        for row in rows:
            print(json.dumps(row))
    else:
        print_table(rows)
    if arguments.plot is not None:
        plot(rows, arguments.plot)
    return exit_status(rows)


def exit_status(rows: list[dict[str, Any]]) -> int:
    """1 if a result is incorrect, else 2 if a row could not run."""
    verdicts = [row["correct"] for row in rows]
    return 1 if False in verdicts else 2 if None in verdicts else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seq-len", type=int, nargs="+", default=[16384], help="default: 16384")
    add("--n-hashes", type=int, nargs="+", default=[8], help="hash rounds (default: 8)")
    add("--heads", type=int, default=8, help="default: 8")
    add("--head-dim", type=int, default=64, help="default: 64")
    add("--window", type=int, default=64, help="ours: window; peers: chunk length (default: 64)")
    add("--n-buckets", type=int, help="ours (default: seq_len / window, a mean bucket size of one window)")
    add("--dtype", choices=sorted(TOLERANCE), default="float32", help="default: float32")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--repeat", type=int, default=4, help="timed runs; the best is reported (default: 4)")
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    add("--impl", nargs="+", choices=IMPLEMENTATIONS, help="default: all that the device supports")
    add("--plot", type=Path, metavar="PNG", help="plot seconds over length (needs matplotlib)")
    add("--json", action="store_true", help="print one JSON object per row instead of the table")
    add("--row", help=argparse.SUPPRESS)
    add("--rows", help=argparse.SUPPRESS)
    return parser.parse_args()


def requested_cases(arguments: argparse.Namespace) -> Iterator[BenchCase]:
    is_cuda = arguments.device.startswith("cuda")
    others = CPU_ONLY if is_cuda else CUDA_ONLY
    wanted = arguments.impl or [name for name in IMPLEMENTATIONS if name not in others]
    missing = [
        row for row, package in PEERS.items() if row in wanted and importlib.util.find_spec(package) is None
    ]
    if missing:
        note = "skipped: not installed (pip install 'reformer_dist[peers]')"
        print(f"bench_attention.py: {' and '.join(missing)} {note}", file=sys.stderr)
    shared = {name: getattr(arguments, name) for name in BenchCase.__dataclass_fields__}
    impls = [impl for impl in IMPLEMENTATIONS if impl in wanted and impl not in missing]
    for seq_len, n_hashes, impl in itertools.product(arguments.seq_len, arguments.n_hashes, impls):
        yield BenchCase(**{**shared, "seq_len": seq_len, "n_hashes": n_hashes, "impl": impl})


def run_in_process(row: BenchCase) -> dict[str, Any] | None:
    """Runs a row in its own process; None if a peer is installed but can't be imported."""
    command = [sys.executable, str(Path(__file__).resolve()), "--row", json.dumps(asdict(row))]
    # the same thread spinning as in the installed commands
    environment = {"GOMP_SPINCOUNT": SPIN_COUNT} | os.environ
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    error = last_line(done.stderr) or f"exit status {done.returncode}"
    if done.returncode == IMPORT_FAILED:
        print(f"bench_attention.py: {row.impl} skipped: {error}", file=sys.stderr)
        return None
    print(f"bench_attention.py: {row.impl} failed: {error}", file=sys.stderr)
    return result_row(row, None, error)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def result_row(
    row: BenchCase, measured: dict[str, float | None] | None, error: str | None = None
) -> dict[str, Any]:
    """A printed row: incorrect without measurements, or not run if there is an error."""
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
    print(json.dumps(result_row(row, measure(row) if is_correct else None)))
    return 0


def run_rows(rows: list[BenchCase]) -> int:
    """Runs rows in this process and prints each as soon as it is measured, for gpu_report.py.

    On CUDA PyTorch counts the memory of a row, and a separate process would cost seconds. Rows that differ only in
    length are equal once shortened, so each kind is checked once.
    """
    check_once = functools.cache(check)
    for row in rows:
        torch.set_num_threads(row.threads)
        try:
            result = result_row(row, measure(row) if check_once(row.shortened()) else None)
        except Exception as error:  # Triton's errors have no common base class
            result = result_row(row, None, describe_error(error))
        print(json.dumps(result), flush=True)
        if result["correct"] is None and not is_usable(row.device):
            break  # the remaining rows need a new process
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return 0


def describe_error(error: Exception) -> str:
    """Its type and the first line of its message, if any."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def is_usable(device: str) -> bool:
    """Whether the device still works: after an illegal access CUDA rejects all calls of the process."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        return False
    return True


def measure(row: BenchCase) -> dict[str, float | None]:
    """Values of MEASURES in seconds and MiB, and keys; hash, sort and keys are None if they don't apply."""
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
    replayed = (
        replay(row, lambda: run_once(attend, q, v, d_out)) if is_cuda and best[0] < MAX_REPLAY_SECONDS else None
    )
    values = [
        *(round(seconds, 5) for seconds in best),
        replayed,
        *split(row, q),
        round(max(0, peak - before) / MIB, 1),
    ]
    keys = (
        round(mean_visible_keys(row, hash_buckets(row, q)), 2)
        if row.impl in OURS and row.impl != OWN_KEYS
        else None
    )
    return {**dict(zip(MEASURES, values, strict=True)), "keys": keys}


def timed(row: BenchCase, work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    if row.device.startswith("cuda"):
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def replay(row: BenchCase, work: Callable[[], Any]) -> float | None:
    """Seconds of the work as a CUDA graph, the best of batches of 5; None if it can't be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        return None
    batches = [timed(row, lambda: [graph.replay() for _ in range(5)])[1] for _ in range(row.repeat)]
    return round(min(batches) / 5, 6)


def split(row: BenchCase, q: Tensor) -> tuple[float | None, float | None]:
    """Seconds of hashing and, on a CPU, of sorting, for our rows."""
    if row.impl not in OURS:
        return None, None
    hashed = [timed(row, lambda: hash_buckets(row, q)) for _ in range(row.repeat)]
    hash_seconds = round(min(seconds for _, seconds in hashed), 5)
    if row.device.startswith("cuda"):
        return hash_seconds, None  # sorting is part of the kernel launch
    head_ids = hashed[0][0].flatten(0, 1)
    options = our_options(row)
    backend = backend_for(options, q)(options, q)
    shards = [
        Shard(ids, row.buckets, torch.arange(1), row.seq_len, query_sort_keys=ids if options.own_keys else None)
        for ids in head_ids.split(1)
    ]
    sorts = [timed(row, lambda: [backend.sort(shard) for shard in shards]) for _ in range(row.repeat)]
    return hash_seconds, round(min(seconds for _, seconds in sorts), 5)


def resident_bytes() -> int:
    if sys.platform != "linux":
        return peak_resident_bytes()
    # returns freed memory to the system first, so that its reuse is counted
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def reset_peak() -> None:
    """Resets the peak resident size (Linux), which excludes the memory of the check."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints rows with their time and memory relative to ours at the same sizes."""
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
    print("time, memory: relative to ours at the same length and number of rounds")


def ratio(row: dict[str, Any], own: dict[str, Any], key: str) -> str | None:
    return f"{row[key] / own[key]:.2f}" if row[key] and own.get(key) else None


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots seconds over length, a line per implementation and number of rounds."""
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
