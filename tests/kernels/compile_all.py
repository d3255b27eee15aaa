"""Compiles the kernels for compute capability 9.0, without a GPU, and prints a JSON line for each."""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reformer_dist.ops.lsh import AttentionOptions, ChunkRule, WindowRule
from reformer_dist.ops.lsh.triton_kernels.backward import attend_round_backward
from reformer_dist.ops.lsh.triton_kernels.forward import attend_round
from reformer_dist.ops.lsh.triton_kernels.hashing import _hash
from reformer_dist.ops.lsh.triton_kernels.rowwise import _merge_rounds, _sum_rounds
from reformer_dist.ops.lsh.triton_kernels.tile_table import _build_table
from reformer_dist.ops.lsh.triton_kernels.tiles import KernelConstants

INT32 = {"order_ptr", "table_ptr", "codes_ptr", "token_ids_ptr", "bounds_ptr"}
FLOAT32 = {"lse_ptr", "delta_ptr", "round_lse_ptr"}
OTHERS = {"ids_ptr": "*u8", "rows_ptr": "*i64", "present_ptr": "*u8"}
FLOATS = {"scale", "dropout_factor"}


def argument_type(name: str, dtype: str):
    if name == "factors":
        return ("i32", "i32")
    if name.endswith("strides"):
        return ("i64", "i64", "i64")
    if name.endswith("_ptr"):
        return OTHERS.get(name, "*i32" if name in INT32 else "*fp32" if name in FLOAT32 else f"*{dtype}")
    return "fp32" if name in FLOATS else "i32"


def compile_one(kernel, dtype: str, constants: dict, n_warps: int) -> None:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else argument_type(name, dtype) for name in names}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": n_warps})
    print(json.dumps({"kernel": kernel.__name__, "dtype": dtype, "shared_bytes": compiled.metadata.shared}))


def main() -> None:
    window = AttentionOptions(WindowRule(64, True), 64, 1.0, count_pairs_once=True, dropout=0.1)
    wrapped = AttentionOptions(ChunkRule(64, True, 1, 0, True), 64, 1.0, dropout=0.1)
    cases = (("bf16", 64, 64, window, False), ("bf16", 64, 64, window, True), ("fp32", 16, 80, wrapped, False))
    for dtype, block, head_dim, options, sharded in cases:
        shared = dtype == "bf16"
        constants = KernelConstants.of(
            options, block, max(16, block // 2), head_dim, 4, shared=shared, sharded=sharded
        )
        for kernel in (attend_round, attend_round_backward):
            compile_one(kernel, dtype, {"C": constants}, 4 if dtype == "bf16" else 8)
    rows = {"ROWS": 64, "HEAD_DIM": 64, "BLOCK_D": 64, "N_ROUNDS": 4}
    for sharded in (False, True):
        compile_one(_merge_rounds, "bf16", {**rows, "SHARDED": sharded}, 4)
        compile_one(_sum_rounds, "bf16", {**rows, "SHARDED": sharded, "IS_DV": True}, 4)
        compile_one(
            _build_table,
            "i16",
            {"SORTED": True, "CHUNKED": False, "SHARDED": sharded, "BLOCK": 64, "SLOTS": 256},
            4,
        )
    sizes = {"ROWS": 128, "HEAD_DIM": 64, "BLOCK_D": 64, "WIDTH": 16, "N_FACTORS": 2}
    for rotates, dtype in ((True, "bf16"), (True, "fp32"), (False, "fp32")):
        parts = 3 if dtype == "bf16" else 1
        compile_one(_hash, dtype, {**sizes, "N_PARTS": parts, "ROTATES": rotates}, 4)


if __name__ == "__main__":
    main()
