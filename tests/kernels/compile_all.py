"""Compiles the kernels for compute capability 9.0, which needs no GPU; prints a JSON line for each."""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reformer_dist.ops.lsh import AttentionOptions, ChunkRule, WindowRule
from reformer_dist.ops.lsh.triton_kernels.backward import attend_round_backward
from reformer_dist.ops.lsh.triton_kernels.tile_table import _build_table
from reformer_dist.ops.lsh.triton_kernels.forward import attend_round
from reformer_dist.ops.lsh.triton_kernels.hashing import _hash
from reformer_dist.ops.lsh.triton_kernels.rowwise import _merge_rounds, _sum_rounds
from reformer_dist.ops.lsh.triton_kernels.tiles import KernelConstants

INTEGERS = {"order_ptr", "table_ptr", "codes_ptr", "who_ptr", "bounds_ptr"}
SINGLE = {"lse_ptr", "delta_ptr", "part_lse_ptr"}
TUPLES = {"draw": ("i32", "i32", "fp32", "i32", "i32", "i32"), "factors": ("i32", "i32")}


def argument_type(name: str, dtype: str):
    if name in TUPLES:
        return TUPLES[name]
    if name.endswith("strides"):
        return ("i64", "i64", "i64")
    if name.endswith("_ptr"):
        if name in INTEGERS:
            return "*i32"
        return {"rotations_ptr": f"*{dtype}", "ids_ptr": "*u8", "places_ptr": "*i64", "here_ptr": "*u8"}.get(
            name, "*fp32" if name in SINGLE else f"*{dtype}"
        )
    return "fp32" if name.endswith("scale") else "i32"


def compile_one(kernel, dtype: str, constants: dict, n_warps: int) -> None:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else argument_type(name, dtype) for name in names}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": n_warps})
    print(json.dumps({"kernel": kernel.__name__, "dtype": dtype, "shared_bytes": done.metadata.shared}))


def main() -> None:
    window = AttentionOptions(WindowRule(64, True), 64, 1.0, count_pairs_once=True, dropout=0.1)
    wrapped = AttentionOptions(ChunkRule(64, True, 1, 0, True), 64, 1.0, dropout=0.1)
    cases = (("bf16", 64, 64, window, False), ("bf16", 64, 64, window, True), ("fp32", 16, 80, wrapped, False))
    for dtype, block, head_dim, options, held in cases:
        shared = dtype == "bf16"
        constants = KernelConstants.of(options, block, max(16, block // 2), head_dim, 4, shared=shared, held=held)
        for kernel in (attend_round, attend_round_backward):
            compile_one(kernel, dtype, {"C": constants}, 4 if dtype == "bf16" else 8)
    rows = {"ROWS": 64, "HEAD_DIM": 64, "BLOCK_D": 64, "N_ROUNDS": 4}
    for held in (False, True):
        compile_one(_merge_rounds, "bf16", {**rows, "HELD": held}, 4)
        compile_one(_sum_rounds, "bf16", {**rows, "HELD": held, "LEADS_BACK": True}, 4)
        compile_one(_build_table, "i16", {"SORTED": True, "CHUNKED": False, "HELD": held, "BLOCK": 64, "PLACES": 256}, 4)
    sizes = {"ROWS": 128, "HEAD_DIM": 64, "BLOCK_D": 64, "WIDTH": 16, "N_FACTORS": 2}
    for rotates, dtype in ((True, "bf16"), (True, "fp32"), (False, "fp32")):
        parts = 3 if dtype == "bf16" else 1
        compile_one(_hash, dtype, {**sizes, "N_PARTS": parts, "ROTATES": rotates}, 4)


if __name__ == "__main__":
    main()
