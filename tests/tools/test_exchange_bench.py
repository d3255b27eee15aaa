"""The sequence parallelism benchmarks at small sizes: printed rows, and bytes against the formula."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def run_tool(name: str, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and the printed rows."""
    command = [sys.executable, str(TOOLS / name), "--json", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_bytes_are_those_of_the_formula() -> None:
    sizes = ("--seq-len", "2048", "--n-heads", "2", "--n-hashes", "3", "--repeats", "1")
    status, rows = run_tool("bench_exchange.py", *sizes, "--meshes", "1x2", "2x1", "1x3")
    assert status == 0 and [(row["heads"], row["buckets"]) for row in rows] == [(1, 2), (2, 1), (1, 3)]
    for row in rows:
        assert {"ranks", "heads", "buckets", "seq_len", "n_hashes", "seconds"} < set(row) and row["correct"]
        assert row["bytes_measured"] == pytest.approx(row["bytes_formula"], rel=0.02)
        assert 0 < row["bytes_measured"] <= 1.5 * row["bytes_all_gather"]
        assert set(row["seconds"]) == {"hash", "plan", "heads", "dispatch", "attend", "combine", "forward"}
        assert row["ranks"] - 1 >= row["sent_to"] >= row["returned_from"] >= 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="live memory on a CPU is read under Linux only")
def test_memory_falls_with_ranks() -> None:
    # looser than the limit for 131072 tokens: at this length the fixed block sizes of attention still matter
    sizes = ("--seq-len", "16384", "--dim", "256")
    _, rows = run_tool("bench_sequence_memory.py", *sizes, "--meshes", "1x1", "4x1", "1x4")
    assert [row["ranks"] for row in rows] == [1, 4, 4]
    assert all(row["share"] < 0.6 for row in rows[1:])
