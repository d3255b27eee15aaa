"""What the kernels of LSH attention cost by their machine code, without a GPU.

Every kernel is compiled exactly as a training step launches it (bf16, 4 rounds, 16 heads, window 64, buckets of 64
tokens on average), and counted. Attention kernels have variants for all tiles of a bucket, in short sequences, or
for its first tile and for those of its tail. Times on an H200 are predictions: a model calibrated once on the
measured times of docs/benchmarks/2026-11-27-nvidia-h200.md, with heads of 64.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fake_gpu
import torch
from fake_gpu import MachineCode

from reformer_dist.ops.lsh import AttentionOptions, WindowRule, draw_rotations
from reformer_dist.ops.lsh.attention import LocalExchange, attend
from reformer_dist.ops.lsh.triton_kernels import backward, forward, hashing, rowwise, tile_table, tuning
from reformer_dist.ops.lsh.triton_kernels.attention import TritonBackend

KERNELS = (
    hashing._hash,
    tile_table._build_table,
    forward.attend_round,
    rowwise._merge_rounds,
    backward.attend_round_backward,
    rowwise._pack_rows,
    rowwise._sum_rounds,
)
MEASURED = ("_hash", "_build_table")  # whose times the model does not predict
TARGETS, HEAD_DIMS = (80, 90, 100), (64, 128)
SHORT = 1024  # tokens of a sequence whose tiles are not split
N_TOKENS, N_HEADS, N_ROUNDS, WINDOW, N_BUCKETS = 65536, 16, 4, 64, 1024

# The H200 of the model.
N_SCHEDULERS = 132 * 4  # each issues an instruction of a warp per cycle
CLOCK = 1.98e6  # cycles per ms
REGISTERS, SHARED_BYTES, MOST_WARPS, MOST_PROGRAMS = 65536, 228 * 1024, 64, 32  # of a multiprocessor
DRAM, L2 = 4.27e9, 5.5e9  # bytes per ms: of a copy, measured; of gathered rows, an estimate
STREAMED = 0.92  # of the rate of a copy, reached by the row-wise kernels when measured
HASH_MS, SORT_MS = {64: 0.249, 128: 0.459}, 0.310  # measured; the latter of torch.sort with the tile table
# Share of the issue slots that each resident warp filled when measured with heads of 64: the kernels wait for
# memory and tensor cores, and only other warps fill the gaps.
FILLED_BY_A_WARP = {"attend_round": 0.0302, "attend_round_backward": 0.0285}
MOST_FILLED = 0.85


Codes = dict[str, list[MachineCode]]  # of a kernel, all variants


@dataclass(frozen=True)
class Tiling:
    """Means of a bucket, whose size is Poisson distributed: tiles, and blocks beside them."""

    tiles: float
    key_blocks: float
    query_blocks: float

    @staticmethod
    def of(size: tuning.Tuning, kind: str, first_block: int = 0) -> Tiling:
        """Tiles of this size: all of a bucket, its first, or those of its tail after first_block rows."""
        mean = N_TOKENS / N_BUCKETS
        tiles = key_blocks = query_blocks = 0.0
        for n_rows in range(1, int(4 * mean)):
            weight = math.exp(n_rows * math.log(mean) - mean - math.lgamma(n_rows + 1))
            firsts = {"all": range(0, n_rows, size.block), "first": [0]}
            for first in firsts.get(kind, range(first_block, n_rows, size.block)):
                tiles += weight
                key_blocks += weight * math.ceil((first - max(first - WINDOW + 1, 0)) / size.other_block)
                beyond = min(first + size.block + WINDOW - 1, n_rows) - first - size.block
                query_blocks += weight * math.ceil(max(beyond, 0) / size.other_block)
        return Tiling(tiles, key_blocks, query_blocks)


def step(head_dim: int, seq_len: int) -> fake_gpu.LaunchCounter:
    """Hashes, attends and runs backward, with queries and values as a projection's views [B, S, H, D]."""
    shape = (1, seq_len, N_HEADS, head_dim)
    q, v = (torch.zeros(shape, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(2))
    rotations = draw_rotations(N_HEADS, head_dim, N_ROUNDS, N_BUCKETS, "rotation", seed=0)
    options = AttentionOptions(WindowRule(WINDOW, causal=True), seq_len // 64, scale=1.0)
    d_out = torch.zeros(shape, dtype=torch.bfloat16).transpose(1, 2)
    with fake_gpu.LaunchCounter() as counter:
        TritonBackend.hash(q, rotations, N_BUCKETS, "rotation", None)
        ids = torch.empty(1, N_HEADS, N_ROUNDS, seq_len, dtype=torch.uint8)
        out = attend(q, None, v, LocalExchange(ids, options, None), TritonBackend)
        out.backward(d_out)
    return counter


def compile_step(head_dim: int, target: int, seq_len: int) -> tuple[Codes, fake_gpu.LaunchCounter]:
    """The variants of kernels that a step needs and none before did, and the launches of another such step."""
    fake_gpu.install(target)
    before = {k: len(_variants(k, target)) for k in KERNELS}
    step(head_dim, seq_len)
    codes = {k.__name__: [fake_gpu.machine_code(x) for x in _variants(k, target)[before[k] :]] for k in KERNELS}
    return codes, step(head_dim, seq_len)


def _variants(kernel: Any, target: int) -> list[Any]:
    return fake_gpu.compiled_variants(kernel, target) if target in kernel.device_caches else []


def resident_warps(code: MachineCode) -> int:
    """Warps that a multiprocessor of the H200 holds at a time."""
    of_a_warp = math.ceil(code.registers / 8) * 8 * 32
    programs = min(
        REGISTERS // (of_a_warp * code.n_warps),
        SHARED_BYTES // (code.shared_bytes + 1024),
        MOST_WARPS // code.n_warps,
        MOST_PROGRAMS,
    )
    return programs * code.n_warps


def slots(code: MachineCode, programs: float, *iterations: float) -> float:
    """Instructions that warps issue, for programs that run the loops, by address, so many times in all."""
    loops = [n for n in map(code.instructions_of, code.loops()) if n > 16]  # shorter ones wait for a barrier
    assert len(loops) == len(iterations), (loops, iterations)
    straight = len(code.instructions) - sum(loops)
    return code.n_warps * (programs * straight + sum(n * i for n, i in zip(loops, iterations, strict=True)))


def slots_per_bucket(name: str, tiles: str, code: MachineCode, head_dim: int) -> float:
    """Issue slots of a bucket and round."""
    size = tuning.tuning_of(head_dim, torch.bfloat16)
    split = size.split
    assert split is not None
    tiling = Tiling.of({"all": size, "first": split.first, "tail": split.tail}[tiles], tiles, split.first.block)
    iterations = [tiling.key_blocks] if tiles != "first" else []
    if name == "attend_round_backward":
        iterations.insert(0, tiling.query_blocks)
    return slots(code, tiling.tiles, *iterations)


def predict(name: str, found: list[MachineCode], head_dim: int) -> float:
    """Milliseconds of a kernel, in all its launches, at N_TOKENS on an H200."""
    rows, vector = N_TOKENS * N_HEADS, 2 * head_dim
    moved = {
        "_merge_rounds": (N_ROUNDS + 1) * (vector + 4),
        "_pack_rows": 3 * vector + 20,
        "_sum_rounds": 2 * (N_ROUNDS + 1) * vector,
    }
    if name in moved:
        return rows * moved[name] / (DRAM * STREAMED)
    gathered = {"attend_round": 3 * vector, "attend_round_backward": 5 * vector}[name]
    ms = 0.0
    for tiles, code in zip(kinds_of(found), found, strict=True):
        filled = min(FILLED_BY_A_WARP[name] * resident_warps(code), MOST_FILLED)
        issued = N_HEADS * N_ROUNDS * N_BUCKETS * slots_per_bucket(name, tiles, code, head_dim)
        ms += issued / (N_SCHEDULERS * CLOCK * filled)
    return max(ms, rows * N_ROUNDS * gathered / L2)


def kinds_of(found: list[MachineCode]) -> list[str]:
    """Which tiles the variants of an attention kernel are for, in the order of their launches."""
    return ["first", "tail"] if len(found) == 2 else ["all"]


def kernel_rows(name: str, target: int, head_dim: int, found: list[MachineCode]) -> Iterator[dict[str, Any]]:
    is_attention = name in FILLED_BY_A_WARP
    for tiles, code in zip(kinds_of(found) if is_attention else [None] * len(found), found, strict=True):
        row = {
            "kernel": name.lstrip("_"),
            "tiles": tiles,
            "target": f"sm_{target}",
            "head_dim": head_dim,
            "registers": code.registers,
            "stack_bytes": code.stack_bytes,
            "instructions": len(code.instructions),
            "tensor_core_instructions": code.tensor_core_instructions,
            "narrow_loads": code.narrow_loads,
            "warps": code.n_warps,
            "shared_bytes": code.shared_bytes,
        }
        if tiles is not None and target == 90:
            row["slots_per_bucket"] = round(slots_per_bucket(name, tiles, code, head_dim))
        yield row


def width_row(
    codes: dict[str, list[MachineCode]], counter: fake_gpu.LaunchCounter, head_dim: int
) -> dict[str, Any]:
    timed = {name: found for name, found in codes.items() if name not in MEASURED}
    parts = {name: predict(name, found, head_dim) for name, found in timed.items()}
    parts |= {"hash": HASH_MS[head_dim], "sort": SORT_MS}
    return {
        "head_dim": head_dim,
        "launches": len(counter.launches),
        "torch_operations": len(counter.operations),
        "predicted_ms": round(sum(parts.values()), 2),
        **{f"{name.lstrip('_')}_ms": round(ms, 3) for name, ms in parts.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="a JSON object per line")
    parser.add_argument("--targets", type=int, nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--head-dims", type=int, nargs="+", choices=HEAD_DIMS, default=HEAD_DIMS)
    args = parser.parse_args()
    widths = []
    for head_dim in args.head_dims:
        for target in args.targets:
            for seq_len in (tuning.SPLIT_SEQ_LEN, SHORT):
                codes, counter = compile_step(head_dim, target, seq_len)
                for name, found in codes.items():
                    for row in kernel_rows(name, target, head_dim, found):
                        show(row, as_json=args.json)
                if target == 90 and seq_len != SHORT:
                    widths.append(width_row(codes, counter, head_dim))
    for row in widths:
        show(row, as_json=args.json)


def show(row: dict[str, Any], *, as_json: bool) -> None:
    print(json.dumps(row) if as_json else "  ".join(f"{key}={value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
