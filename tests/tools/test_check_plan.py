"""The memory of real runs is within the tolerance of the plan (tools/check_plan.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_plan.py"


@pytest.mark.slow
def test_peaks_are_within_a_tenth_of_the_plan():
    command = [sys.executable, TOOL, "--rows", "no recompute", "encoder-decoder, LSH", "ZeRO 2, bf16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
