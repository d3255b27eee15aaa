"""The kernels compile for a GPU, without one, as they are launched: the interpreter accepts more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")
from reformer_dist.ops.lsh import AttentionOptions, WindowRule
from reformer_dist.ops.lsh.attention import LocalExchange, attend
from reformer_dist.ops.lsh.triton_kernels.attention import TritonBackend

TESTS = Path(__file__).parents[1]
TOOLS = TESTS.parent / "tools"
LARGEST_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)
KERNELS = {"_hash", "_build_table", "attend_round", "attend_round_backward"}
KERNELS |= {"attend_own_keys", "own_keys_backward_queries", "own_keys_backward_keys"}
KERNELS |= {"_row_products", "_pack_rows", "_merge_rounds", "_sum_rounds"}


class Budget(NamedTuple):
    """The most that a kernel may have, but exactly so many tensor core instructions."""

    registers: int
    stack_bytes: int
    instructions: int
    narrow_loads: int
    tensor_core_instructions: int


# Of bf16 as training launches it, under every supported version of Triton; instructions with 2 % to spare.
BUDGETS = {
    ("attend_round", "all", "sm_100", 64): Budget(94, 0, 1550, 11, 14),
    ("attend_round", "all", "sm_100", 128): Budget(96, 96, 1285, 13, 32),
    ("attend_round", "all", "sm_80", 64): Budget(168, 0, 1400, 11, 96),
    ("attend_round", "all", "sm_80", 128): Budget(150, 0, 1215, 13, 32),
    ("attend_round", "all", "sm_90", 64): Budget(96, 0, 1365, 11, 14),
    ("attend_round", "all", "sm_90", 128): Budget(96, 64, 1330, 13, 32),
    ("attend_round", "first", "sm_100", 64): Budget(72, 24, 1075, 9, 8),
    ("attend_round", "first", "sm_100", 128): Budget(128, 0, 1440, 13, 12),
    ("attend_round", "first", "sm_80", 64): Budget(128, 0, 980, 9, 64),
    ("attend_round", "first", "sm_80", 128): Budget(194, 0, 1835, 13, 112),
    ("attend_round", "first", "sm_90", 64): Budget(72, 0, 940, 9, 8),
    ("attend_round", "first", "sm_90", 128): Budget(126, 0, 1280, 13, 12),
    ("attend_round", "tail", "sm_100", 64): Budget(126, 0, 1260, 14, 32),
    ("attend_round", "tail", "sm_100", 128): Budget(96, 144, 1475, 14, 32),
    ("attend_round", "tail", "sm_80", 64): Budget(154, 0, 1235, 14, 32),
    ("attend_round", "tail", "sm_80", 128): Budget(168, 8, 1305, 14, 32),
    ("attend_round", "tail", "sm_90", 64): Budget(126, 0, 1285, 14, 32),
    ("attend_round", "tail", "sm_90", 128): Budget(96, 104, 1485, 14, 32),
    ("attend_round_backward", "all", "sm_100", 64): Budget(156, 0, 2320, 17, 42),
    ("attend_round_backward", "all", "sm_100", 128): Budget(168, 72, 1570, 22, 96),
    ("attend_round_backward", "all", "sm_80", 64): Budget(255, 104, 2190, 17, 272),
    ("attend_round_backward", "all", "sm_80", 128): Budget(214, 0, 1520, 22, 96),
    ("attend_round_backward", "all", "sm_90", 64): Budget(168, 56, 1775, 17, 42),
    ("attend_round_backward", "all", "sm_90", 128): Budget(168, 32, 1555, 22, 96),
    ("attend_round_backward", "first", "sm_100", 64): Budget(128, 24, 1800, 12, 30),
    ("attend_round_backward", "first", "sm_100", 128): Budget(173, 0, 2430, 17, 46),
    ("attend_round_backward", "first", "sm_80", 64): Budget(255, 24, 1590, 12, 192),
    ("attend_round_backward", "first", "sm_80", 128): Budget(255, 168, 2695, 17, 400),
    ("attend_round_backward", "first", "sm_90", 64): Budget(128, 144, 1390, 12, 30),
    ("attend_round_backward", "first", "sm_90", 128): Budget(255, 40, 1810, 17, 46),
    ("attend_round_backward", "tail", "sm_100", 64): Budget(168, 112, 1675, 21, 96),
    ("attend_round_backward", "tail", "sm_100", 128): Budget(168, 144, 1715, 23, 96),
    ("attend_round_backward", "tail", "sm_80", 64): Budget(238, 0, 1545, 21, 96),
    ("attend_round_backward", "tail", "sm_80", 128): Budget(235, 0, 1640, 23, 96),
    ("attend_round_backward", "tail", "sm_90", 64): Budget(168, 72, 1715, 21, 96),
    ("attend_round_backward", "tail", "sm_90", 128): Budget(168, 88, 1735, 23, 96),
}


def compile_all(cache: Path, what: str) -> list[dict[str, Any]]:
    """The lines of compile_all.py."""
    return run(cache, Path(__file__).with_name("compile_all.py"), what)


def run(cache: Path, script: Path, *arguments: str) -> list[dict[str, Any]]:
    """The lines of a script, in a process whose kernels are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(TESTS), str(TOOLS), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_budgets(rows: list[dict[str, Any]]) -> int:
    """The number of kernels that have a budget, which they keep."""
    fields = ("kernel", "tiles", "target", "head_dim")
    found = {tuple(row[x] for x in fields): row for row in rows if "kernel" in row}
    for key in found.keys() & BUDGETS.keys():
        row, budget = found[key], BUDGETS[key]
        assert row["tensor_core_instructions"] == budget.tensor_core_instructions, row
        for name in ("registers", "stack_bytes", "instructions", "narrow_loads"):
            assert row[name] <= getattr(budget, name), f"{key}: {name}={row[name]}, at most {budget}"
    return len(found.keys() & BUDGETS.keys())


def test_budgets(tmp_path: Path) -> None:
    rows = run(tmp_path, TOOLS / "kernel_costs.py", "--json", "--targets", "90", "--head-dims", "64")
    assert check_budgets(rows) == 6
    of_rows = [row for row in rows if row.get("kernel", "").endswith(("_rounds", "_rows"))]
    assert len(of_rows) == 3 and not any(row["stack_bytes"] for row in of_rows), of_rows
    width = rows[-1]
    assert width["head_dim"] == 64 and width["launches"] == 9 and width["torch_operations"] == 2, width
    assert 1 < width["predicted_ms"] < 2.6


def test_host_costs(tmp_path: Path) -> None:
    """Few launches. Besides, PyTorch sorts, and clears the table of tiles."""
    (row,) = compile_all(tmp_path, "host")
    forward = ["_hash", "_build_table", "attend_round", "_merge_rounds"]
    assert row["launches"] == [*forward, "_pack_rows", "attend_round_backward", "_sum_rounds"]
    assert row["operations"] == ["sort", "zeros"], row
    assert row["ratio"] < 25, row  # about 10


@pytest.mark.slow
def test_budgets_of_other_targets(tmp_path: Path) -> None:
    assert check_budgets(run(tmp_path, TOOLS / "kernel_costs.py", "--json")) == len(BUDGETS)


@pytest.mark.slow
def test_all_compile_as_launched(tmp_path: Path) -> None:
    rows = compile_all(tmp_path, "kernels")
    assert {row["kernel"] for row in rows} == KERNELS
    assert all(row["shared_bytes"] <= 227 * 1024 and row["registers"] <= 255 for row in rows)
    for kernel in ("attend_own_keys", "own_keys_backward_queries", "own_keys_backward_keys"):
        first = next(row for row in rows if row["kernel"] == kernel)
        assert first["registers"] <= 168 and first["stack_bytes"] <= 128, first


@pytest.mark.slow
def test_dropout_seeds_compile_once(tmp_path: Path) -> None:
    rows = compile_all(tmp_path, "seeds")
    assert len(rows) > 4 and all(row["variants"] == [1, 1] for row in rows), rows


@pytest.mark.slow
def test_more_heads_than_a_grid_dimension_holds(tmp_path: Path) -> None:
    rows = compile_all(tmp_path, "grids")
    assert {row["kernel"] for row in rows} == KERNELS
    assert any(row["grid"][0] >= 70_000 for row in rows)
    for row in rows:
        assert all(size <= most for size, most in zip(row["grid"], LARGEST_GRID, strict=True)), row


def test_more_rounds_than_a_grid_dimension_holds_are_refused() -> None:
    v = torch.zeros(1, 1, 1, 16)
    ids = torch.zeros(1, 1, 2**16, 1, dtype=torch.uint8)
    exchange = LocalExchange(ids, AttentionOptions(WindowRule(2, causal=True), 1, scale=1.0), None)
    with pytest.raises(ValueError, match=r"n_hashes=65536: .*65535"):
        attend(v, None, v, exchange, TritonBackend)
