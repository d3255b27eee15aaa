"""tools/bench_resume.py runs; its timings need an idle machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_resume.py"


@pytest.mark.slow
def test_the_first_batch_after_few_and_many_samples():
    command = [sys.executable, TOOL, "--samples", "1000", "100000", "--rounds", "1", "--limit", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["1,000", "100,000"]
