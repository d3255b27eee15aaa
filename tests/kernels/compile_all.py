"""Compiles the kernels for compute capability 9.0 by launching them on a fake GPU; prints a JSON line for each.

kernels: every kernel, as training launches it. seeds: the number of variants of the attention kernels after each
dropout seed. grids: the grids of a call with more (batch row, head) pairs than a dimension of a grid may have.
host: launches, PyTorch's operations on memory, and the time of a forward and backward without the device's work,
relative to an autograd function that does nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import fake_gpu
import torch
from support.shards import partition_shards

from reformer_dist.ops.lsh import AttentionOptions, ChunkRule, Rule, WindowRule, draw_rotations
from reformer_dist.ops.lsh.attention import BackwardTensors, ForwardTensors, LocalExchange, attend
from reformer_dist.ops.lsh.triton_kernels import backward, forward, hashing, own_keys, rowwise, tile_table
from reformer_dist.ops.lsh.triton_kernels.attention import TritonBackend

HALF, FLOAT = torch.bfloat16, torch.float32
KERNELS = (
    hashing._hash,
    tile_table._build_table,
    forward.attend_round,
    backward.attend_round_backward,
    own_keys.attend_own_keys,
    own_keys.own_keys_backward_queries,
    own_keys.own_keys_backward_keys,
    rowwise._row_products,
    rowwise._merge_rounds,
    rowwise._pack_rows,
    rowwise._sum_rounds,
)


def step(
    rule: Rule, dtype: torch.dtype, head_dim: int = 64, n_rounds: int = 4, n_buckets: int = 64,
    seq_len: int = 4096, n_heads: int = 2, shared: bool = True, scheme: str = "rotation", **options: object,
) -> None:  # fmt: skip
    """Hashes, attends and runs backward, with queries and values as a projection's views [B, S, H, D]."""
    q, k, v = (torch.randn(1, seq_len, n_heads, head_dim).to(dtype).transpose(1, 2) for _ in range(3))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    rotations = draw_rotations(n_heads, head_dim, n_rounds, n_buckets, scheme, seed=0)
    ids = TritonBackend.hash(q, rotations, n_buckets, scheme, None if n_buckets > 1 else ())
    attention = AttentionOptions(rule, n_buckets, scale=1.0, **options)
    exchange = LocalExchange(ids, attention, None, ids if attention.own_keys else None)
    attend(q, None if shared else k, v, exchange, TritonBackend).sum().backward()


def attend_partition(rule: WindowRule) -> None:
    """Forward and backward of one of three partitions of a sorted order."""
    ids = torch.randint(0, 64, (1, 2, 4, 4096))
    options = AttentionOptions(rule, 64, scale=1.0, backend="triton")
    part = list(partition_shards(ids, options, None, 3))[1]
    q, v = (torch.randn(1, 1, len(part.row_index), 64).to(HALF) for _ in range(2))
    shard = TritonBackend(options, v).sort(part.shard)
    lse = torch.empty(v.shape[:3])
    shard.attend(ForwardTensors(q, None, v, torch.empty_like(v), lse))
    grads = torch.zeros_like(q), None, torch.zeros_like(v)
    delta = TritonBackend(options, v).row_dot(v, v)
    shard.attend_backward(BackwardTensors(q, None, v, v, lse, delta, *grads))


def compile_everything() -> None:
    window = WindowRule(64, causal=True)
    step(window, HALF)
    step(window, HALF, count_pairs_once=True, dropout=0.1)
    step(window, HALF, head_dim=128, n_rounds=1)
    step(window, HALF, document_ids=torch.arange(4096).unsqueeze(0) // 500)
    step(window, FLOAT, scheme="floor")
    step(WindowRule(128, causal=True, sees_self=True), HALF, n_rounds=1, n_buckets=1, shared=False)
    step(ChunkRule(64, True, 1, 0, True), FLOAT, head_dim=80, dropout=0.1, shared=False)
    seeing_itself = WindowRule(64, causal=True, sees_self=True)
    step(seeing_itself, HALF, shared=False, own_keys=True)
    step(seeing_itself, FLOAT, shared=False, own_keys=True, count_pairs_once=True, dropout=0.1)
    attend_partition(window)
    for kernel in KERNELS:
        for compiled in fake_gpu.compiled_variants(kernel):
            code = fake_gpu.machine_code(compiled)
            sizes = {x: getattr(code, x) for x in ("registers", "stack_bytes", "shared_bytes")}
            print(json.dumps({"kernel": kernel.__name__, **sizes}))


def count_variants() -> None:
    for seed in (12345, 16 * 4567, 1, 0, 2**62 + 5, 16 * 99):
        step(WindowRule(64, causal=True), HALF, seq_len=256, n_buckets=4, dropout=0.1, dropout_seed=seed)
        kernels = (forward.attend_round, backward.attend_round_backward)
        print(json.dumps({"seed": seed, "variants": [len(fake_gpu.compiled_variants(k)) for k in kernels]}))


def print_grids() -> None:
    sizes = {"head_dim": 16, "n_rounds": 2, "n_buckets": 2, "seq_len": 16, "n_heads": 70_000}
    step(WindowRule(8, causal=True), HALF, **sizes)
    step(WindowRule(8, causal=True, sees_self=True), HALF, shared=False, own_keys=True, **sizes)
    v = torch.zeros(1, 70_000, 16, 16, dtype=HALF)
    TritonBackend(AttentionOptions(WindowRule(8, causal=True), 2, scale=1.0), v).row_dot(v, v)
    for launch in fake_gpu.LAUNCHES:
        print(json.dumps(launch._asdict()))


class Nothing(torch.autograd.Function):
    """The least that any attention costs the host."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(v)

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(d_out), torch.empty_like(d_out)


def print_host_costs() -> None:
    q, v = (torch.zeros(1, 64, 2, 64, dtype=HALF).transpose(1, 2).requires_grad_() for _ in range(2))
    rotations = draw_rotations(2, 64, 4, 4, "rotation", seed=0)
    attention = AttentionOptions(WindowRule(64, causal=True), 4, scale=1.0)
    d_out = torch.zeros_like(v)

    def attend_once() -> None:
        ids = TritonBackend.hash(q, rotations, 4, "rotation", (4,))
        out = attend(q, None, v, LocalExchange(ids, attention, None), TritonBackend)
        torch.autograd.grad(out, (q, v), d_out)

    def do_nothing() -> None:
        torch.autograd.grad(Nothing.apply(q, v), (q, v), d_out)

    def fastest(call: Callable[[], object], repeats: int = 300) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    attend_once()  # compiles
    with fake_gpu.LaunchCounter() as counter:
        attend_once()
    least, host = fastest(do_nothing), fastest(attend_once)
    costs = {"launches": counter.launches, "operations": counter.operations}
    print(json.dumps(costs | {"microseconds": round(host * 1e6), "ratio": round(host / least, 1)}))


if __name__ == "__main__":
    fake_gpu.install()
    parts = {
        "kernels": compile_everything,
        "seeds": count_variants,
        "grids": print_grids,
        "host": print_host_costs,
    }
    parts[sys.argv[1]]()
