"""The kernels compile for a GPU, without one, as they are launched: the interpreter accepts more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from fake_gpu import LARGEST_GRID, SHARED_BYTES

from reformer_dist.ops.lsh import AttentionOptions, WindowRule
from reformer_dist.ops.lsh.attention import LocalExchange, attend
from reformer_dist.ops.lsh.triton_kernels.attention import TritonBackend

KERNELS = {"_hash", "_build_table", "attend_round", "attend_round_backward"}
KERNELS |= {"attend_own_keys", "own_keys_backward_queries", "own_keys_backward_keys"}
KERNELS |= {"_row_products", "_merge_rounds", "_sum_rounds"}
# Registers of the launches that Tuning caps, and spills of the commonest one: bf16, head_dim 64, without options.
SPILLED_BYTES = {
    "attend_round": 0,
    "attend_round_backward": 128,
    "attend_own_keys": 0,
    "own_keys_backward_queries": 0,
    "own_keys_backward_keys": 128,
}


def compile_all(cache: Path, what: str) -> list[dict[str, Any]]:
    """The lines of compile_all.py, in a process whose kernels are not interpreted."""
    script = Path(__file__).with_name("compile_all.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(script.parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, script, what]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_all_compile_as_launched(tmp_path: Path) -> None:
    rows = compile_all(tmp_path, "kernels")
    assert {row["kernel"] for row in rows} == KERNELS
    assert all(row["shared_bytes"] <= SHARED_BYTES and row["registers"] <= 255 for row in rows)
    for kernel, most in SPILLED_BYTES.items():
        first = next(row for row in rows if row["kernel"] == kernel)
        assert first["registers"] <= 168 and first["spilled_bytes"] <= most, first


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
