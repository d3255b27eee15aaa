"""tools/bench_serving.py at a small size: a row for each number of streams, with the texts checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_serving.py"


@pytest.mark.slow
@pytest.mark.parametrize("shared", [(), ("--shared",)])
def test_rows(shared: tuple[str, ...]) -> None:
    sizes = ("--rows", "1x64", "3x64", "--tokens", "24", "--dim", "64", "--layers", "2", "--n-buckets", "4")
    command = [sys.executable, str(TOOL), *sizes, *shared, "--threads", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2
