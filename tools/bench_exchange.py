#!/usr/bin/env python3
"""Cost of LSH attention over a sequence sharded across ranks: seconds and bytes by phase.

Each row is a separate job on this machine (gloo on a CPU, NCCL on GPUs) with a mesh of heads x buckets ranks.
Bytes are those sent per rank in one forward of one LSH layer, the mean over ranks, compared with the formula of
docs/sequence_parallelism.md for the measured number of destination ranks, and with an all-gather of q and v.
Seconds are those of the slowest rank, by phase and without overlap of exchange and attention; `step` is forward
and backward with overlap and, in parentheses, without. A row whose result differs from that of one rank shows no
speed, and the tool exits 1.

If a CPU has fewer cores than ranks, compare seconds within a row, not across rows.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import Any

import torch
from mesh_jobs import run_job
from torch import Tensor

from reformer_dist.distributed import runtime
from reformer_dist.distributed.mesh import make_mesh
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.ops.lsh import AttentionOptions, WindowRule, bucket_attention, draw_rotations, hash_vectors
from reformer_dist.ops.lsh.attention import Exchange
from reformer_dist.parallel import SlicedSequence
from reformer_dist.parallel.bucket_exchange import BucketExchange
from reformer_dist.parallel.traffic import LayerShape, all_gather_bytes, bucket_bytes, head_bytes

GRIDS = ["1x2", "2x1", "1x3", "1x4", "2x2", "4x1"]
PHASES = ("hash", "plan", "heads", "dispatch", "attend", "combine")
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
MIB = 2**20


def main() -> int:
    arguments = parse_arguments()
    if arguments.row is not None:
        run_row(arguments)
        return 0
    rows = [run_job(__file__, mesh) for mesh in arguments.meshes]
    if arguments.json:
        for row in rows:
            print(json.dumps(row))
    else:
        print_table(arguments, rows)
    return 0 if all(row["correct"] for row in rows) else 1


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
    add("--seq-len", type=int, default=16384, help="length of the whole sequence (default: 16384)")
    add("--batch", type=int, default=1, help="default: 1")
    add("--n-heads", type=int, default=8, help="default: 8")
    add("--head-dim", type=int, default=64, help="default: 64")
    add("--n-hashes", type=int, default=4, help="default: 4")
    add("--window", type=int, default=64, help="default: 64")
    add("--dtype", choices=sorted(TOLERANCE), default="float32", help="default: float32")
    add("--repeats", type=int, default=3, help="timed runs; the best is reported (default: 3)")
    add("--skip-check", action="store_true", help="for sequences that do not fit on one rank")
    add("--json", action="store_true", help="print one JSON object per row instead of the table")
    add("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_row(arguments: argparse.Namespace) -> None:
    """Runs one rank of a row's job; rank 0 prints the row."""
    heads, buckets = map(int, arguments.row.split("x"))
    job = runtime.start()
    if job.device.type == "cpu":
        torch.set_num_threads(1)
    row = ExchangeBenchmark(arguments, job, heads, buckets).measure()
    if job.is_main:
        print(json.dumps(row))
    runtime.stop()


class ExchangeBenchmark:
    """One sharded LSH attention, on one rank."""

    def __init__(self, arguments: argparse.Namespace, job: Runtime, heads: int, buckets: int) -> None:
        self.arguments, self.job = arguments, job
        self.meshes = {overlaps: make_mesh(job, heads, buckets, overlaps=overlaps) for overlaps in (True, False)}
        self.sequence = SlicedSequence(self.meshes[False], arguments.seq_len)
        self.n_buckets = max(2, arguments.seq_len // arguments.window // 2 * 2)
        self.options = AttentionOptions(WindowRule(arguments.window, causal=True), self.n_buckets, scale=1.0)
        self.shape = (arguments.batch, arguments.n_heads, self.sequence.n_local, arguments.head_dim)
        self.rotations = draw_rotations(
            arguments.n_heads, arguments.head_dim, arguments.n_hashes, self.n_buckets, "rotation", seed=0
        )
        self.q, self.v, self.d_out = (self.vectors(self.meshes[False].slice_index, name) for name in range(3))

    def vectors(self, slice_index: int, name: int) -> Tensor:
        """The tensor of a slice, which every rank can generate."""
        draw = torch.Generator().manual_seed(1000 * slice_index + name)
        dtype = getattr(torch, self.arguments.dtype)
        return torch.randn(self.shape, generator=draw).to(self.job.device, dtype)

    def measure(self) -> dict[str, Any]:
        is_correct = self.arguments.skip_check or self.check()
        exchange = self.run(overlaps=False)  # warm-up
        stats = self.meshes[False].stats
        best: dict[str, float] = {}
        for _ in range(self.arguments.repeats):
            stats.clear()
            start = self.now()
            exchange = self.run(overlaps=False)
            phases = {phase: stats.seconds.get(phase, 0.0) for phase in PHASES}
            phases["forward"] = self.now() - start
            slowest = {name: max(self.job.gather(seconds)) for name, seconds in phases.items()}
            if not best or slowest["forward"] < best["forward"]:
                best = slowest
        sent = {phase: self.job.sum([n])[0] / self.job.world_size for phase, n in self.bytes_by_phase(stats)}
        row = self.describe(exchange, sum(sent.values()))
        row |= {"correct": is_correct, "bytes_by_phase": sent, "seconds": None, "step": None}
        if is_correct:
            row["seconds"] = best
            row["step"] = {str(overlaps): self.time_step(overlaps) for overlaps in (True, False)}
        return row

    @staticmethod
    def bytes_by_phase(stats: Any) -> list[tuple[str, float]]:
        return [
            (phase, float(stats.bytes_sent.get(phase, 0))) for phase in PHASES if phase not in ("hash", "attend")
        ]

    def now(self) -> float:
        if self.job.device.type == "cuda":
            torch.cuda.synchronize()
        self.job.barrier()
        return time.perf_counter()

    def run(self, *, overlaps: bool, backward: bool = False) -> Exchange:
        mesh = self.meshes[overlaps]
        sequence = SlicedSequence(mesh, self.arguments.seq_len)
        with mesh.stats.timed("hash"):
            ids = hash_vectors(self.q, self.rotations, self.n_buckets, "rotation")
        mask = sequence.key_padding_mask(self.arguments.batch, self.job.device)
        leaves = [t.detach().requires_grad_(backward) for t in (self.q, self.v)]
        exchange = sequence.make_exchange(ids, self.options, mask)
        out = sequence.bucket_attention(leaves[0], None, leaves[1], exchange)
        if backward:
            torch.autograd.grad(out, leaves, self.d_out)
        else:
            self.out = out
        return exchange

    def time_step(self, overlaps: bool) -> float:
        self.run(overlaps=overlaps, backward=True)
        best = math.inf
        for _ in range(self.arguments.repeats):
            start = self.now()
            self.run(overlaps=overlaps, backward=True)
            best = min(best, max(self.job.gather(self.now() - start)))
        return best

    def check(self) -> bool:
        """Whether the result equals that of one rank with the whole sequence, on every rank."""
        self.run(overlaps=False)
        mesh, sequence = self.meshes[False], self.sequence
        whole_q, whole_v = (
            torch.cat([self.vectors(i, name) for i in range(mesh.size)], dim=2)[:, :, : self.arguments.seq_len]
            for name in (0, 1)
        )
        ids = hash_vectors(self.q, self.rotations, self.n_buckets, "rotation")
        blocks = mesh.sequence_group.all_gather(ids, "check")
        slices = [blocks[mesh.rank_of_slice(i)] for i in range(mesh.size)]
        whole_ids = torch.cat(slices, dim=3)[..., : self.arguments.seq_len]
        expected = bucket_attention(whole_q, None, whole_v, whole_ids, self.options)
        start = mesh.slice_index * sequence.n_local
        expected = expected[:, :, start : start + sequence.n_local]
        error = (self.out[:, :, : expected.shape[2]].float() - expected.float()).abs().max().item()
        return max(self.job.gather(error)) <= TOLERANCE[self.arguments.dtype] * expected.abs().max().item()

    def describe(self, exchange: Exchange, measured: float) -> dict[str, Any]:
        arguments, mesh = self.arguments, self.meshes[False]
        shape = LayerShape(
            rows=arguments.batch,
            slice_len=self.sequence.n_local,
            n_heads=arguments.n_heads,
            head_dim=arguments.head_dim,
            n_hashes=arguments.n_hashes,
            n_buckets=self.n_buckets,
            element_size=self.q.element_size(),
        )
        sent, returned = self.other_ranks(exchange, shape)
        return {
            "ranks": mesh.size,
            "heads": mesh.heads,
            "buckets": mesh.buckets,
            "seq_len": arguments.seq_len,
            "n_hashes": arguments.n_hashes,
            "n_buckets": self.n_buckets,
            "dtype": arguments.dtype,
            "device": self.job.device.type,
            "sent_to": sent,
            "returned_from": returned,
            "bytes_measured": measured,
            "bytes_formula": head_bytes(shape, mesh.heads)
            + bucket_bytes(shape, mesh.heads, mesh.buckets, sent, returned),
            "bytes_all_gather": all_gather_bytes(shape, mesh.size),
        }

    def other_ranks(self, exchange: Exchange, shape: LayerShape) -> tuple[float, float]:
        """Mean number of other ranks to which a token is sent as a key, and as a query."""
        if not isinstance(exchange, BucketExchange):
            return 0.0, 0.0
        plan, own = exchange.plan, self.meshes[False].bucket_rank
        totals = [0.0, 0.0]
        for route in plan.routes:
            for which, selection in enumerate((route.sent, route.sent_queries)):
                totals[which] += sum(selection.splits) - selection.splits[own]
        sent, returned = (n / shape.tokens / self.job.world_size for n in self.job.sum(totals))
        return sent, returned


def print_table(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    print(
        f"{arguments.seq_len} tokens, {arguments.n_heads} heads of {arguments.head_dim}, {arguments.n_hashes} "
        f"rounds, {arguments.dtype}, {rows[0]['device']}; MiB and seconds per rank, forward"
    )
    print(
        f"{'mesh':>6} {'measured':>9} {'formula':>8} {'ratio':>6} {'vs all-gather':>13}  "
        + " ".join(f"{phase:>8}" for phase in PHASES)
        + f" {'forward':>8} {'step':>16}"
    )
    for row in rows:
        measured, formula, gathered = (row[f"bytes_{name}"] for name in ("measured", "formula", "all_gather"))
        line = (
            f"{row['heads']:>3}x{row['buckets']:<2} {measured / MIB:>9.2f} {formula / MIB:>8.2f} "
            f"{measured / formula:>6.3f} {measured / gathered:>13.3f}  "
        )
        if not row["correct"]:
            print(line + "INCORRECT RESULT: speed not shown")
            continue
        seconds, step = row["seconds"], row["step"]
        line += " ".join(f"{seconds[phase]:>8.4f}" for phase in (*PHASES, "forward"))
        print(line + f" {step['True']:>8.4f} ({step['False']:.4f})")


if __name__ == "__main__":
    sys.exit(main())
